"""Operator: what somebody who runs a consortium asks of its server."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc

from fedlora import __version__
from fedlora.client.joining import channel, split_address
from fedlora.diagnosis import diagnose
from fedlora.errors import ConfigError, RunFailed
from fedlora.protos import consortium_pb2 as consortium
from fedlora.protos import exchange_pb2 as exchange
from fedlora.protos.consortium_pb2_grpc import ConsortiumStub
from fedlora.protos.exchange_pb2_grpc import DeltaExchangeStub
from fedlora.storage import storage_errors
from fedlora.tls import TlsFiles

CALL_S = 20.0
# a server that is restarted is back before that
AWAY_S = 120.0

Event = dict[str, Any]


def _event(text: str) -> Event | None:
    """An event as the server keeps it; None for half a line."""
    try:
        found = json.loads(text)
    except ValueError:
        return None
    return found if isinstance(found, dict) and "event" in found else None


class Operator:
    """A server, as its operator sees it.

    Args:
        server: HOST:PORT of its exchange.
        tls: the operator's certificate; None for plain text.
        wait: waits for so many seconds.

    Raises:
        ConfigError: `server` is not of the form HOST:PORT.
        CertificateError: the certificate cannot be used.
    """

    def __init__(
        self, server: str, tls: TlsFiles | None, wait: Callable[[float], None] = time.sleep
    ) -> None:
        self.server = server
        self.tls = tls
        self.credentials = tls.load("operator") if tls else None
        self.wait = wait
        self.host, self.port = split_address(server)

    def submit(self, job_toml: str, plugin: bytes = b"") -> str:
        """Starts a run; gives its lineage id.

        Raises:
            ConfigError: the server refuses the job or the caller.
            RunFailed: the server is not there.
        """
        request = consortium.SubmitRequest(job_toml=job_toml, plugin=plugin, version=__version__)
        with self._stub() as stub:
            return str(stub.Submit(request, timeout=CALL_S).run)

    def resume(self, run: str) -> None:
        """Continues a run that has ended early; see `submit`."""
        with self._stub() as stub:
            stub.Submit(consortium.SubmitRequest(run=run, version=__version__), timeout=CALL_S)

    def stop(self, run: str) -> None:
        """Ends a run after its last committed round; see `submit`."""
        with self._stub() as stub:
            stub.Stop(consortium.StopRequest(run=run), timeout=CALL_S)

    def runs(self) -> list[consortium.RunSummary]:
        """The runs that the server knows, oldest first; see `submit`."""
        with self._stub() as stub:
            return list(stub.ListRuns(consortium.ListRunsRequest(), timeout=CALL_S).runs)

    def follow(self, run: str) -> Iterator[Event]:
        """Every event of a run, until it ends; a server that is away is waited for.

        Raises:
            ConfigError: the server refuses the caller, or knows no such run.
            RunFailed: the server stayed away.
        """
        seen, away_since, last = 0, 0.0, -1
        while True:
            try:
                with channel(self.server, self.credentials) as opened:
                    request = exchange.WatchRequest(run=run, skip=seen)
                    for item in DeltaExchangeStub(opened).Watch(request):
                        seen, away_since = int(item.number) + 1, 0.0
                        event = _event(item.json)
                        if event is None:
                            continue
                        # after a crash of the server the journal is written anew, and shifts
                        if event["event"] == "round":
                            if event["round"] <= last:
                                continue
                            last = event["round"]
                        yield event
                        if event["event"] in ("end", "failed"):
                            return
            except grpc.RpcError as e:
                if e.code() is not grpc.StatusCode.UNAVAILABLE:
                    raise self._error(e) from e
                away_since = away_since or time.monotonic()
                if time.monotonic() - away_since > AWAY_S:
                    raise self._error(e) from e
            self.wait(0.5)

    def fetch(self, run: str, folder: Path) -> None:
        """Copies the files of a run's folder into `folder`; see `submit`.

        Raises:
            StorageError: the disk refused.
        """
        with self._stub() as stub:
            for name in self._read(stub, run, "").decode().splitlines():
                parts = name.split("/")
                if not name or name.startswith("/") or ".." in parts:
                    raise RunFailed(f"server {self.server} names a file {name[:80]!r}")
                target = folder.joinpath(*parts)
                with storage_errors(target):
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(self._read(stub, run, name))

    def _read(self, stub: ConsortiumStub, run: str, path: str) -> bytes:
        request = consortium.FetchFileRequest(run=run, path=path)
        return b"".join(piece.chunk for piece in stub.FetchFile(request))

    @contextmanager
    def _stub(self) -> Iterator[ConsortiumStub]:
        with channel(self.server, self.credentials) as opened:
            try:
                yield ConsortiumStub(opened)
            except grpc.RpcError as e:
                raise self._error(e) from e

    def _error(self, error: grpc.RpcError) -> Exception:
        code = error.code()
        if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
            return RunFailed(diagnose(self.host, self.port, self.tls).text)
        return ConfigError(f"server {self.server}: {error.details()}")
