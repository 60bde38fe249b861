"""`fedlora server`: the SuperLink, its executor and the exchange, kept alive on one machine."""

import logging
import os
import socket
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from prometheus_client import CollectorRegistry

from fedlora.errors import ConfigError, StorageError
from fedlora.health import Health, HealthServer
from fedlora.processes import Child
from fedlora.server.control import FlowerControl
from fedlora.server.home import HOME_VARIABLE, Home
from fedlora.server.keeper import Keeper
from fedlora.server.settings import ServerSettings
from fedlora.telemetry.journal import JournalMetrics
from fedlora.telemetry.processes import ProcessMetrics
from fedlora.tls import TlsFiles

log = logging.getLogger(__name__)

TEND_S = 0.25

# what Flower would otherwise do by itself: report home, look for updates, install packages
QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    # seconds between two looks of an executor for a task
    "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.25",
}


@dataclass(frozen=True)
class ServerOptions:
    """What `fedlora server` was asked for.

    Attributes:
        home: folder that outlives the processes.
        host: address to bind to.
        port: of the exchange, which is what users give to clients and operators.
        flower_port: of the SuperLink.
        tls: the server's certificate; None for plain text.
        ca_folder: the consortium's CA, for requests in `enrol` and for what it revoked.
        enrol: drop-box of certificate requests that are signed unseen.
        device: of the server's own evaluations.
        allow_plugins: jobs may bring the file of their strategy.
        health: HOST:PORT of the health endpoint; None for none.
        logging: variables by which its processes log alike.
    """

    home: Path
    host: str
    port: int
    flower_port: int
    tls: TlsFiles | None
    ca_folder: Path | None = None
    enrol: Path | None = None
    device: str = "cpu"
    allow_plugins: bool = False
    health: str | None = None
    logging: Mapping[str, str] = field(default_factory=dict)


class ServerSupervisor:
    """Runs a server until it is told to stop.

    Args:
        options: what was asked for.
    """

    def __init__(self, options: ServerOptions) -> None:
        self.options = options
        self.home = Home(options.home)
        self.stopped = threading.Event()
        self.children = self._children()
        self._trouble = ""

    def run(self) -> None:
        """Starts everything and tends it until `stop` is called.

        Raises:
            ConfigError: a port is in use.
            StorageError: the disk refused.
        """
        options = self.options
        for option, port in (("--port", options.port), ("--flower-port", options.flower_port)):
            check_port(options.host, port, option)
        self.home.prepare()
        ServerSettings(f":{options.port}", options.device, options.allow_plugins).write(self.home)
        control = FlowerControl(options.flower_port, options.tls.ca if options.tls else None)
        keeper = Keeper(self.home, control)
        health = self._health()
        try:
            if health is not None:
                health.start()
            for child in self.children:
                child.start()
            while not self.stopped.wait(TEND_S):
                for child in self.children:
                    child.tend()
                self._keep(keeper)
        finally:
            # those that ask before the one that answers
            for child in reversed(self.children):
                child.stop()
            control.close()
            if health is not None:
                health.stop()

    def status(self) -> Health:
        """How its processes are; it takes work once the exchange does."""
        parts = tuple(child.part() for child in self.children)
        is_ready = all(part.is_alive for part in parts) and _answers(self.options.port)
        return Health(parts, is_ready)

    def stop(self) -> None:
        """Ends `run`; may be called from a signal handler."""
        self.stopped.set()

    def _keep(self, keeper: Keeper) -> None:
        try:
            keeper.tend()
        except StorageError as e:
            # the processes go on; runs are tended again once there is space
            if str(e) != self._trouble:
                log.error("%s", e)
            self._trouble = str(e)
        else:
            self._trouble = ""

    def _health(self) -> HealthServer | None:
        if self.options.health is None:
            return None
        registry = CollectorRegistry()
        registry.register(ProcessMetrics(self.status))
        registry.register(JournalMetrics(self._journals))
        return HealthServer(self.options.health, self.status, registry)

    def _journals(self) -> dict[Path, str]:
        return {place.events: place.run for place in self.home.places()}

    def _children(self) -> list[Child]:
        options, logs = self.options, self.home.folder / "logs"
        python = [sys.executable, "-m"]
        tls = options.tls
        environment = {**QUIET, HOME_VARIABLE: str(self.home.folder), **self.options.logging}
        link = [*python, "fedlora.server.superlink", "--host", options.host]
        link += ["--port", str(options.flower_port), "--isolation", "process"]
        link += ["--database", str(self.home.flower / "superlink.db")]
        executor = [str(Path(sys.executable).with_name("flower-superexec"))]
        executor += ["--runtime-api-address", f"127.0.0.1:{options.flower_port}"]
        executor += ["--parent-pid", str(os.getpid())]
        exchange = [*python, "fedlora.server.exchange_process", "--home", str(self.home.folder)]
        exchange += ["--host", options.host, "--port", str(options.port)]
        exchange += ["--flower-port", str(options.flower_port)]
        if tls is None:
            link += ["--insecure"]
            executor += ["--insecure"]
            exchange += ["--insecure"]
        else:
            link += ["--ssl-ca-certfile", str(tls.ca), "--ssl-certfile", str(tls.certificate)]
            link += ["--ssl-keyfile", str(tls.key), "--enable-supernode-auth"]
            executor += ["--root-certificates", str(tls.ca)]
            exchange += ["--ca", str(tls.ca), "--cert", str(tls.certificate)]
            exchange += ["--key", str(tls.key)]
            if options.ca_folder is not None:
                exchange += ["--ca-folder", str(options.ca_folder)]
            if options.enrol is not None:
                exchange += ["--enrol", str(options.enrol)]
        if options.allow_plugins:
            exchange += ["--allow-plugins"]
        return [
            Child("superlink", link, logs / "superlink.log", environment),
            Child("superexec", executor, logs / "superexec.log", environment),
            Child("exchange", exchange, logs / "exchange.log", environment),
        ]


def check_port(host: str, port: int, option: str) -> None:
    """Refuses a port that somebody listens on.

    Raises:
        ConfigError: with the option that names it.
    """
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind((host, port))
        except OSError as e:
            raise ConfigError(
                f"{option} {port}: {host}:{port} cannot be listened on ({e.strerror}); stop what "
                f"uses it, or choose another port with {option}"
            ) from e


def _answers(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), 1.0):
            return True
    except OSError:
        return False
