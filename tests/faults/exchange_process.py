"""An exchange in a process of its own, to be attacked, measured and killed.

python -m tests.faults.exchange_process FOLDER PORT [CERTIFICATE KEY CA]

Prints its port, and serves until its standard input ends. With the three files (PEM) it speaks
TLS and asks for certificates. FOLDER holds the store and the ticket key.
"""

import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import grpc

from fedlora.server.blob_store import BlobStore
from fedlora.server.exchange import ExchangeServer
from fedlora.server.run_events import FollowedFolders
from fedlora.tickets import Ticket, mint, ticket_key

ROOT = Path(__file__).parents[2]


class ExchangeProcess:
    """Starts one, and starts it again on the same port after a kill.

    Args:
        folder: of the store.
        files: certificate, key and CA; none for plain text.
    """

    def __init__(self, folder: Path, files: tuple[Path, ...] = ()) -> None:
        self.folder = folder
        self.key = ticket_key(folder / "ticket.key")
        self.store = BlobStore(folder / "store")
        self._files = files
        self.port = 0
        self.start()

    def start(self) -> None:
        arguments = [str(self.folder), str(self.port), *map(str, self._files)]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.exchange_process", *arguments],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.port = int(self.process.stdout.readline())

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        self.process.communicate(timeout=60)

    def ticket(self, direction="up", client="site-0", **changes) -> str:
        made = Ticket("run", 1, 0, client, 7, direction, 1 << 30, time.time() + 3600)
        return mint(self.key, replace(made, **changes))

    def status_bytes(self, field: str) -> int:
        """See the function of this name."""
        return status_bytes(self.process.pid, field)

    def forget_peak(self) -> None:
        """VmHWM counts from here on."""
        Path(f"/proc/{self.process.pid}/clear_refs").write_text("5")

    def __enter__(self) -> "ExchangeProcess":
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.stop()


def status_bytes(pid: int | str, field: str) -> int:
    """A size in /proc/<pid>/status, e.g. VmRSS or VmHWM."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def main(folder: Path, port: int, files: list[Path]) -> None:
    credentials = None
    if files:
        certificate, key, authority = (file.read_bytes() for file in files)
        credentials = grpc.ssl_server_credentials([(key, certificate)], authority, True)
    server = ExchangeServer(
        BlobStore(folder / "store"),
        ticket_key(folder / "ticket.key"),
        address=f"127.0.0.1:{port}",
        credentials=credentials,
        require_identity=bool(files),
        is_revoked=lambda serial: False,
        events=FollowedFolders(folder / "runs"),
    )
    print(server.start(), flush=True)
    sys.stdin.read()
    server.drain(5.0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), [Path(name) for name in sys.argv[3:]])
