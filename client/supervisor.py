"""`fedlora client`: the SuperNode and the resident worker of one client, kept alive."""

import fcntl
import hashlib
import logging
import os
import socket
import sys
import tempfile
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from prometheus_client import CollectorRegistry

from fedlora.client.joining import Joined, join, new_node_key
from fedlora.client.worker_metrics import WorkerMetrics, ask
from fedlora.errors import JoinDelayed
from fedlora.health import Health, HealthServer
from fedlora.processes import Child
from fedlora.storage import storage_errors
from fedlora.telemetry.processes import ProcessMetrics
from fedlora.tls import TlsFiles

log = logging.getLogger(__name__)

TEND_S = 0.25
# seconds between two tries to join a server that does not answer
LONGEST_WAIT_S = 15.0

QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1",
}


@dataclass(frozen=True)
class Seat:
    """One client of this machine: its name, and its folder, which it alone uses.

    Attributes:
        home: folder that outlives the processes.
        partition: place of its data in the division that the job makes; None if it has its own
            data, or if the division names it.
        lock: descriptor that holds the folder.
    """

    home: Path
    name: str
    partition: int | None
    lock: int

    @classmethod
    def take(cls, home: Path, name: str, partition: int | None) -> "Seat | None":
        """The seat, or None when another process has it.

        Raises:
            StorageError: the disk refused.
        """
        with storage_errors(home):
            home.mkdir(parents=True, exist_ok=True, mode=0o700)
            descriptor = os.open(home / ".lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(descriptor)
            return None
        return cls(home.absolute(), name, partition, descriptor)


@dataclass(frozen=True)
class ClientOptions:
    """What `fedlora client` was asked for.

    Attributes:
        server: HOST:PORT of the server's exchange.
        seat: who this client is.
        data: its own data.
        tls: the client's certificate; None for plain text.
        policy: file of what this site permits.
        device: where it trains.
        rank: the largest rank it can train; 0 for any.
        idle_s: after so long without work, model and data leave memory.
        health: HOST:PORT of the health endpoint; None for none.
        logging: variables by which its processes log alike.
    """

    server: str
    seat: Seat
    data: str | None
    tls: TlsFiles | None
    policy: Path | None = None
    device: str = "cpu"
    rank: int = 0
    idle_s: float = 600.0
    health: str | None = None
    logging: Mapping[str, str] = field(default_factory=dict)


class ClientSupervisor:
    """Runs a client until it is told to stop.

    Args:
        options: what was asked for.
    """

    def __init__(self, options: ClientOptions) -> None:
        self.options = options
        self.stopped = threading.Event()
        self.home = options.seat.home
        # a unix socket's path has at most 107 bytes, a home may be deep
        self.socket = _socket_path(self.home)
        self.worker = self._worker()
        self.node: Child | None = None

    def run(self) -> None:
        """Joins, starts everything and tends it until `stop` is called.

        Raises:
            JoinRefused: the server refuses this client for good.
            StorageError: the disk refused.
        """
        health = self._health()
        try:
            if health is not None:
                health.start()
            self.worker.start()
            joined = self._join()
            while joined and not self.stopped.wait(TEND_S):
                self.worker.tend()
                if self.node is None:
                    self.node = self._node(joined)
                    self.node.start()
                elif not self.node.is_alive and not self.stopped.is_set():
                    # a node that died comes back as a new one, which the server must let in
                    log.warning(
                        "the SuperNode ended; the last it printed:\n%s", self.node.last_lines()
                    )
                    self.node.stop()
                    self.node = None
                    self.stopped.wait(1.0)
                    joined = self._join()
        finally:
            if self.node is not None:
                self.node.stop()
            self.worker.stop()
            if health is not None:
                health.stop()
            os.close(self.options.seat.lock)

    def status(self) -> Health:
        """How its processes are; it takes work once it has joined."""
        children = [self.worker, *([self.node] if self.node else [])]
        parts = tuple(child.part() for child in children)
        detail = "" if self.node else f"joining {self.options.server}"
        is_ready = self.node is not None and all(part.is_alive for part in parts)
        return Health(parts, is_ready, detail)

    def stop(self) -> None:
        """Ends `run`; may be called from a signal handler."""
        self.stopped.set()

    def _join(self) -> Joined | None:
        """Joins, however long the server takes to answer; None when told to stop."""
        wait, said = 0.5, ""
        while not self.stopped.is_set():
            self.worker.tend()
            try:
                options = self.options
                public_key = new_node_key(self.home / "node.key")
                joined = join(options.server, options.seat.name, options.tls, public_key)
            except JoinDelayed as e:
                if str(e) != said:
                    log.warning("%s; trying again", e)
                    said = str(e)
                self.stopped.wait(wait)
                wait = min(2 * wait, LONGEST_WAIT_S)
            else:
                log.info("joined %s as %s", options.server, options.seat.name)
                return joined
        return None

    def _health(self) -> HealthServer | None:
        if self.options.health is None:
            return None
        registry = CollectorRegistry()
        registry.register(ProcessMetrics(self.status))
        registry.register(WorkerMetrics(lambda: ask(self.socket)))
        return HealthServer(self.options.health, self.status, registry)

    def _worker(self) -> Child:
        options = self.options
        command = [sys.executable, "-m", "fedlora.client.worker_process"]
        command += ["--socket", str(self.socket), "--name", options.seat.name]
        command += ["--state", str(self.home / "state"), "--device", options.device]
        command += ["--idle-s", str(options.idle_s)]
        if options.seat.partition is not None:
            command += ["--partition", str(options.seat.partition)]
        if options.data is not None:
            command += ["--data", options.data]
        if options.policy is not None:
            command += ["--policy", str(options.policy)]
        if options.tls is not None:
            command += ["--ca", str(options.tls.ca), "--cert", str(options.tls.certificate)]
            command += ["--key", str(options.tls.key)]
        return Child("worker", command, self.home / "logs" / "worker.log", options.logging)

    def _node(self, joined: Joined) -> Child:
        options = self.options
        host = options.server.rpartition(":")[0]
        command = [sys.executable, "-m", "fedlora.client.supernode"]
        command += ["--superlink", f"{host}:{joined.flower_port}", "--port", str(_free_port())]
        config = {"name": options.seat.name, "worker-socket": str(self.socket), "server-host": host}
        pairs = [f'{key}="{value}"' for key, value in config.items()]
        command += ["--node-config", " ".join([*pairs, f"rank={options.rank}"])]
        if options.tls is None:
            command += ["--insecure"]
        else:
            command += ["--root-certificates", str(options.tls.ca)]
            command += ["--auth-supernode-private-key", str(self.home / "node.key")]
        return Child(
            "supernode", command, self.home / "logs" / "supernode.log", {**QUIET, **options.logging}
        )


def _socket_path(home: Path) -> Path:
    path = home / "worker.sock"
    if len(os.fsencode(path)) <= 100:
        return path
    digest = hashlib.sha256(os.fsencode(home)).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"fedlora-{os.getuid()}-{digest}"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder / "worker.sock"


def _free_port() -> int:
    with socket.socket() as trial:
        trial.bind(("127.0.0.1", 0))
        port: int = trial.getsockname()[1]
    return port
