"""Home: where a server keeps what outlives its processes.

tickets.key                  signs tickets; shared by the exchange and the ServerApps
exchange/                    blobs on their way (fedlora.server.blob_store)
flower/superlink.db          Flower's own state
runs/<run>/job.toml          the job as it was submitted
runs/<run>/plugin.py         its strategy's file, if it names one
runs/<run>/events.jsonl      every event of the run, for those who watch
runs/<run>/folder/           the run folder
runs/<run>/outcome.json      how the run ended; until then it is tried again
runs/<run>/lock              held by the ServerApp that works on it
"""

import fcntl
import json
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fedlora.errors import RunFolderError
from fedlora.storage import storage_errors, write_atomic

# a run's lineage id: also part of paths, and of what peers send
RUN_ID = re.compile(r"[0-9a-f]{16}")

# whoever looks whether a run is worked on holds its lock for a moment
LOCK_S = 1.0

# names the folder of a server to the processes that Flower starts
HOME_VARIABLE = "FEDLORA_SERVER_HOME"


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        state: "finished", "failed" or "stopped".
        exit_code: what `fedlora run` exits with.
        detail: why it failed; empty otherwise.
    """

    state: str
    exit_code: int
    detail: str = ""


class Home:
    """The folder of one server."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()
        self.ticket_key = self.folder / "tickets.key"
        self.exchange = self.folder / "exchange"
        self.flower = self.folder / "flower"
        self.runs = self.folder / "runs"

    def prepare(self) -> None:
        """Makes the folders.

        Raises:
            StorageError: the disk refused.
        """
        with storage_errors(self.folder):
            for folder in (self.folder, self.exchange, self.flower, self.runs):
                folder.mkdir(parents=True, exist_ok=True, mode=0o700)

    def place(self, run: str) -> "Place":
        """The place of a run, which need not exist.

        Raises:
            RunFolderError: not a lineage id.
        """
        if not RUN_ID.fullmatch(run):
            raise RunFolderError(
                f"run {run[:40]!r} is no lineage id; expected 16 hexadecimal digits, as "
                "fedlora run prints them"
            )
        return Place(self.runs / run)

    def places(self) -> list["Place"]:
        """The places of all runs, oldest first."""
        found = [Place(p) for p in self.runs.glob("*") if RUN_ID.fullmatch(p.name)]
        return sorted(
            (place for place in found if place.job.is_file()),
            key=lambda place: (place.job.stat().st_mtime_ns, place.run),
        )


class Place:
    """What a server keeps of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.run = path.name
        self.job = path / "job.toml"
        self.plugin = path / "plugin.py"
        self.events = path / "metrics.jsonl"
        self.folder = path / "folder"
        self._outcome = path / "outcome.json"
        self._lock = path / "lock"

    def submit(self, job_toml: str, plugin: bytes) -> None:
        """Keeps a new run; it exists once its job does.

        Raises:
            StorageError: the disk refused.
        """
        with storage_errors(self.path):
            self.path.mkdir(parents=True)
        if plugin:
            write_atomic(self.plugin, plugin)
        write_atomic(self.job, job_toml.encode())

    def outcome(self) -> Outcome | None:
        """How the run ended, or None while it has not."""
        try:
            return Outcome(**json.loads(self._outcome.read_bytes()))
        except (OSError, ValueError, TypeError):
            return None

    def end(self, outcome: Outcome) -> None:
        """Keeps how the run ended.

        Raises:
            StorageError: the disk refused.
        """
        write_atomic(self._outcome, json.dumps(vars(outcome), sort_keys=True).encode())

    def reopen(self) -> None:
        """Forgets how the run ended, so that it is continued."""
        self._outcome.unlink(missing_ok=True)

    @contextmanager
    def working(self) -> Iterator[None]:
        """Inside, this process works on the run; the lock goes when the process does.

        Raises:
            RunFolderError: another process works on it.
        """
        with storage_errors(self.path):
            descriptor = os.open(self._lock, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            ends = time.monotonic() + LOCK_S
            while not _locked(descriptor):
                if time.monotonic() > ends:
                    raise RunFolderError(
                        f"run {self.run} is worked on by another process; wait for it"
                    )
                time.sleep(0.01)
            yield
        finally:
            os.close(descriptor)

    def is_worked_on(self) -> bool:
        """A process works on the run now."""
        try:
            descriptor = os.open(self._lock, os.O_RDWR)
        except FileNotFoundError:
            return False
        try:
            return not _locked(descriptor)
        finally:
            os.close(descriptor)


def _locked(descriptor: int) -> bool:
    """Takes the lock on a file; says whether it could."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
