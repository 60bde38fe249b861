"""The resident worker of one client: python -m fedlora.client.worker_process --help."""

import argparse
import fcntl
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import grpc

from fedlora.client.courier import Connect, Transfer
from fedlora.client.duty import Duty
from fedlora.client.exchange import ExchangeClient
from fedlora.client.policy import load_policy
from fedlora.client.resident import Resident
from fedlora.client.worker import Worker
from fedlora.client.worker_socket import MOST_WAITING, listen
from fedlora.data.own import OwnData
from fedlora.errors import ConfigError, FedloraError
from fedlora.logs import configure_from_environment
from fedlora.storage import storage_errors
from fedlora.tls import TlsFiles

# a transfer that gets no further for so long is given up
PATIENCE_S = 120.0
# seconds in which the step at hand may end after SIGTERM
GRACE_S = 3.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Serves until SIGTERM; 0 when that came, 2 for options that cannot be used."""
    options = _parser().parse_args(arguments)
    try:
        configure_from_environment()
        return _serve(options)
    except FedloraError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2


def _serve(options: argparse.Namespace) -> int:
    if options.data is not None and options.partition is not None:
        raise ConfigError("--data and --partition were both given; leave one out")
    name: str = options.name
    if not name or "/" in name or name.startswith("."):
        raise ConfigError(f"--name {name!r} is no file name; choose another one")
    lock = _lock(options.state, name)
    try:
        read = OwnData(name, partition=options.partition, source=options.data)
        duty = Duty(
            name,
            options.state,
            Resident(read, options.device),
            exchange_connection(_credentials(options)),
            load_policy(options.policy),
        )
        worker = Worker(
            duty,
            most_waiting=MOST_WAITING,
            idle_s=options.idle_s,
            ends_idle=options.ends_idle,
        )
        server = listen(worker, options.socket)
        stopped = threading.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: stopped.set())
        # apart from the main thread, which waits for signals
        computing = threading.Thread(target=_compute, args=(worker, stopped), daemon=True)
        computing.start()
        print(f"worker of {name} ready at {options.socket}", flush=True)
        stopped.wait()
        worker.stop()
        server.stop(grace=1.0).wait()
        computing.join(GRACE_S)
        options.socket.unlink(missing_ok=True)
        sys.stdout.flush()
        if computing.is_alive():
            # amid a long step; whatever it leaves is whole on disk or not there
            os._exit(0)
    finally:
        os.close(lock)
    return 0


def _compute(worker: Worker, stopped: threading.Event) -> None:
    try:
        worker.serve()
    finally:
        stopped.set()


def exchange_connection(credentials: grpc.ChannelCredentials | None) -> Connect:
    """Opens exchanges at HOST:PORT with these credentials; None talks in plain text."""

    @contextmanager
    def connect(address: str) -> Iterator[Transfer]:
        client = ExchangeClient(address, credentials, patience_s=PATIENCE_S)
        try:
            yield client
        finally:
            client.close()

    return connect


def _credentials(options: argparse.Namespace) -> grpc.ChannelCredentials | None:
    given = [options.ca, options.cert, options.key]
    if not any(given):
        return None
    if not all(given):
        raise ConfigError("--ca, --cert and --key belong together; give all three")
    files = TlsFiles(options.ca, options.cert, options.key).load("client")
    return grpc.ssl_channel_credentials(files.ca, files.key, files.certificate)


def _lock(state: Path, name: str) -> int:
    """A descriptor that holds the state folder, which one worker alone may use."""
    with storage_errors(state):
        state.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor = os.open(state / "worker.lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
        os.close(descriptor)
        raise ConfigError(
            f"--state {state} is in use by another worker; give {name!r} a folder of its own"
        ) from e
    return descriptor


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("fedlora-worker", description=__doc__)
    parser.add_argument("--socket", type=Path, required=True, help="unix socket to serve on")
    parser.add_argument("--name", required=True, help="name of the client")
    parser.add_argument("--state", type=Path, required=True, help="folder of this client alone")
    parser.add_argument("--partition", type=int, help="place in the job's own division, from 0")
    parser.add_argument("--data", help="this client's own file or folder")
    parser.add_argument("--policy", type=Path, help="file of what this site permits")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument(
        "--idle-s", type=float, default=600.0, help="seconds after which memory is given back"
    )
    parser.add_argument(
        "--ends-idle", action="store_true", help="end when idle, instead of giving memory back"
    )
    parser.add_argument("--ca", type=Path, help="certificate of the consortium's authority")
    parser.add_argument("--cert", type=Path, help="this client's certificate")
    parser.add_argument("--key", type=Path, help="its private key")
    return parser


if __name__ == "__main__":
    sys.exit(main())
