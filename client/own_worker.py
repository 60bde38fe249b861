"""The worker that a Flower node starts for itself, when nobody keeps one for it."""

import fcntl
import hashlib
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

# seconds without work after which such a worker ends
IDLE_S = 600.0


@dataclass(frozen=True)
class OwnWorker:
    """A worker in the background; it outlives the process that starts it.

    Attributes:
        folder: of this node; holds its state and its log.
        socket: where it listens.
        partition: place of its data in the job's own division.
    """

    folder: Path
    socket: Path
    name: str
    partition: int

    def start(self) -> None:
        """Starts it, unless it is alive or on its way.

        Raises:
            OSError: it cannot be started.
        """
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with (self.folder / "worker.lock").open("wb") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return
            command = [sys.executable, "-m", "fedlora.client.worker_process"]
            command += ["--socket", str(self.socket), "--name", self.name]
            command += ["--partition", str(self.partition), "--state", str(self.folder / "state")]
            command += ["--idle-s", str(IDLE_S), "--ends-idle"]
            with (self.folder / "worker.log").open("ab") as log:
                subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    # it inherits the lock, which is held until it ends, however that comes about
                    pass_fds=[lock.fileno()],
                )


def own_worker(node: int, name: str, partition: int) -> OwnWorker:
    """The worker of a node, below FEDLORA_HOME (by default ~/.cache/fedlora).

    Args:
        node: Flower's id of the node.
        name: of the client.
        partition: place of its data in the job's own division.
    """
    home = Path(os.environ.get("FEDLORA_HOME") or Path.home() / ".cache" / "fedlora").absolute()
    folder = home / "nodes" / f"{node}-{partition}"
    digest = hashlib.sha256(os.fsencode(folder)).hexdigest()[:16]
    # a unix socket's path has at most 107 bytes, a home may be deep
    place = Path(tempfile.gettempdir()) / f"fedlora-{os.getuid()}" / f"{digest}.sock"
    return OwnWorker(folder, place, name, partition)
