"""Consortium: the service by which clients join, and operators start and follow runs."""

import secrets
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import grpc

from fedlora import __version__
from fedlora.clock import check_clock
from fedlora.config.load import load_job, parse_job_text
from fedlora.errors import ClockError, ConfigError, FedloraError
from fedlora.protos import consortium_pb2 as pb
from fedlora.protos.consortium_pb2_grpc import ConsortiumServicer
from fedlora.server.deployable import check_deployable
from fedlora.server.home import Home, Outcome, Place
from fedlora.server.identity import peer_identity
from fedlora.server.journal import Journal

MAX_JOB_BYTES = 64 * 1024
MAX_PLUGIN_BYTES = 2**20
CHUNK_BYTES = 2**20


class Consortium(ConsortiumServicer):
    """Serves one server's folder.

    Args:
        home: the folder.
        flower_port: of the SuperLink.
        register: (client, public key) -> lets its SuperNode in; None without authentication.
        is_known: callers prove who they are by certificates.
        is_revoked: whether the certificate with this serial number is void.
        allow_plugins: jobs may bring the file of their strategy.
    """

    def __init__(
        self,
        home: Home,
        *,
        flower_port: int,
        register: Callable[[str, bytes], None] | None,
        is_known: bool,
        is_revoked: Callable[[int], bool],
        allow_plugins: bool,
    ) -> None:
        self.home = home
        self.flower_port = flower_port
        self.register = register
        self.is_known = is_known
        self.is_revoked = is_revoked
        self.allow_plugins = allow_plugins

    def Join(self, request: pb.JoinRequest, context: grpc.ServicerContext) -> pb.JoinReply:  # noqa: N802
        """See protos/consortium.proto."""
        if request.version != __version__:
            self._abort(
                context,
                grpc.StatusCode.FAILED_PRECONDITION,
                f"the client runs fedlora {request.version[:40]!r}, the server {__version__!r}; "
                "install the same version on both",
            )
        name = request.name
        if not 0 < len(name) <= 80 or not name.isprintable():
            self._abort(
                context,
                grpc.StatusCode.INVALID_ARGUMENT,
                f"client name {name[:40]!r}: expected 1 to 80 printable characters",
            )
        identity = self._require(context, "client")
        if identity and identity != name:
            self._abort(
                context,
                grpc.StatusCode.PERMISSION_DENIED,
                f"the client calls itself {name!r}, its certificate is for {identity!r}; start "
                f"it with --name {identity}, or give it the certificate of {name!r}",
            )
        try:
            # before its key is known to Flower, which would list it as a node
            check_clock(request.clock_s, time.time())
        except ClockError as e:
            self._abort(context, grpc.StatusCode.OUT_OF_RANGE, str(e))
        if self.register is not None:
            try:
                self.register(name, request.public_key)
            except FedloraError as e:
                self._abort(context, grpc.StatusCode.UNAVAILABLE, str(e))
        return pb.JoinReply(version=__version__, flower_port=self.flower_port, clock_s=time.time())

    def Submit(self, request: pb.SubmitRequest, context: grpc.ServicerContext) -> pb.SubmitReply:  # noqa: N802
        """See protos/consortium.proto."""
        self._require(context, "operator")
        if request.version != __version__:
            self._abort(
                context,
                grpc.StatusCode.FAILED_PRECONDITION,
                f"this is fedlora {request.version[:40]!r}, the server runs {__version__!r}; "
                "install the same version on both",
            )
        try:
            if request.run:
                return pb.SubmitReply(run=self._continue(request.run))
            return pb.SubmitReply(run=self._new(request.job_toml, request.plugin))
        except FedloraError as e:
            self._abort(context, grpc.StatusCode.INVALID_ARGUMENT, str(e))

    def Stop(self, request: pb.StopRequest, context: grpc.ServicerContext) -> pb.StopReply:  # noqa: N802
        """See protos/consortium.proto."""
        self._require(context, "operator")
        place = self._place(request.run, context)
        if place.outcome() is None:
            place.end(Outcome("stopped", 130, "stopped by an operator"))
            Journal(place.events).append(
                {"event": "failed", "exit_code": 130, "why": "stopped by an operator"}
            )
        return pb.StopReply()

    def ListRuns(  # noqa: N802
        self, request: pb.ListRunsRequest, context: grpc.ServicerContext
    ) -> pb.ListRunsReply:
        """See protos/consortium.proto."""
        self._require(context, "operator")
        return pb.ListRunsReply(runs=[_summary(place) for place in self.home.places()])

    def FetchFile(  # noqa: N802
        self, request: pb.FetchFileRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.FileChunk]:
        """See protos/consortium.proto."""
        self._require(context, "operator")
        folder = self._place(request.run, context).folder
        if not request.path:
            names = sorted(_files(folder)) if folder.is_dir() else []
            yield pb.FileChunk(chunk="\n".join(names).encode())
            return
        if request.path not in _files(folder):
            self._abort(
                context,
                grpc.StatusCode.NOT_FOUND,
                f"run {request.run} has no file {request.path[:200]!r}",
            )
        with (folder / request.path).open("rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                yield pb.FileChunk(chunk=chunk)

    def _new(self, job_toml: str, plugin: bytes) -> str:
        if len(job_toml.encode()) > MAX_JOB_BYTES:
            raise ConfigError(f"the job has more than {MAX_JOB_BYTES} bytes")
        job = parse_job_text(job_toml)
        check_deployable(job)
        strategy = job.federation.strategy
        if ":" in strategy and not strategy.startswith("flwr:") and not self.allow_plugins:
            raise ConfigError(
                f'federation.strategy = "{strategy}" is code of your own for the server, which was '
                "not started with --allow-plugins"
            )
        if ".py:" in strategy and not 0 < len(plugin) <= MAX_PLUGIN_BYTES:
            raise ConfigError(
                f'federation.strategy = "{strategy}": its file has {len(plugin)} bytes; '
                f"expected 1 to {MAX_PLUGIN_BYTES}"
            )
        place = self.home.place(secrets.token_hex(8))
        place.submit(job_toml, plugin)
        return place.run

    def _continue(self, run: str) -> str:
        place = self.home.place(run)
        if not place.job.is_file():
            raise ConfigError(f"the server has no run {run}")
        outcome = place.outcome()
        if outcome is not None and outcome.state != "finished":
            Journal(place.events).reopen()
            place.reopen()
        return run

    def _place(self, run: str, context: grpc.ServicerContext) -> Place:
        try:
            place = self.home.place(run)
        except FedloraError as e:
            self._abort(context, grpc.StatusCode.INVALID_ARGUMENT, str(e))
        if not place.job.is_file():
            self._abort(context, grpc.StatusCode.NOT_FOUND, f"the server has no run {run}")
        return place

    def _require(self, context: grpc.ServicerContext, role: str) -> str:
        """The caller's name, whose certificate must be of this role; empty if none is asked."""
        if not self.is_known:
            return ""
        identity = peer_identity(context)
        if identity is None:
            self._abort(
                context,
                grpc.StatusCode.UNAUTHENTICATED,
                "no certificate was presented; give one with --certs",
            )
        if self.is_revoked(identity.serial):
            self._abort(
                context,
                grpc.StatusCode.PERMISSION_DENIED,
                f"the certificate of {identity.name!r} was revoked; ask the operator for another",
            )
        if identity.role != role:
            self._abort(
                context,
                grpc.StatusCode.PERMISSION_DENIED,
                f"the certificate of {identity.name!r} is of the role {identity.role!r}; this "
                f"needs one of the role {role!r}",
            )
        return str(identity.name)

    def _abort(self, context: grpc.ServicerContext, code: grpc.StatusCode, detail: str) -> NoReturn:
        context.abort(code, detail)
        raise AssertionError("abort raises")


def _files(folder: Path) -> set[str]:
    """Paths of the plain files below a run's folder; what clients keep stays out of it."""
    return {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and not path.is_symlink() and path.name != ".lock"
    }


def _summary(place: Place) -> pb.RunSummary:
    outcome = place.outcome()
    events = Journal(place.events).read()
    rounds = [event for event in events if event["event"] == "round"]
    job = load_job(place.job)
    if outcome is not None:
        state = outcome.state
    else:
        state = "running" if place.is_worked_on() else "waiting"
    return pb.RunSummary(
        run=place.run,
        name=job.run.name,
        state=state,
        round=rounds[-1]["round"] if rounds else 0,
        rounds=job.federation.rounds,
    )
