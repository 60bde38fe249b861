"""Events of runs as they happen, read from the metrics.jsonl of their folders."""

import json
import os
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from fedlora.errors import RunFolderError
from fedlora.server.journal import Event
from fedlora.tickets import RUN

POLL_S = 0.2
# lines are written by this machine; a longer one is not one of them
MAX_LINE_BYTES = 1 << 20


@dataclass(frozen=True)
class NumberedEvent:
    """One line of metrics.jsonl.

    Attributes:
        run: lineage id.
        number: of the event in its run, from 0.
        json: the line.
    """

    run: str
    number: int
    json: str


class RunEvents(Protocol):
    """Where a Watch gets its events."""

    def follow(self, run: str, skip: int, stop: threading.Event) -> Iterator[NumberedEvent]:
        """The events of `run` from number `skip` on, until the run ends or `stop` is set.

        Args:
            run: lineage id; empty for the newest run.

        Raises:
            RunFolderError: there is no such run.
        """
        ...


class FollowedFolders:
    """Follows <runs>/<lineage id>/metrics.jsonl."""

    def __init__(self, runs: Path) -> None:
        self._runs = runs

    def follow(self, run: str, skip: int, stop: threading.Event) -> Iterator[NumberedEvent]:
        """See RunEvents.follow; the file may come later than its folder."""
        folder = self._folder(run)
        for number, line in _lines(folder, skip, stop):
            yield NumberedEvent(folder.name, number, line)
            if _is_end(line):
                return

    def _folder(self, run: str) -> Path:
        if not run:
            folders = [path for path in self._runs.glob("*") if (path / "job.toml").is_file()]
            if not folders:
                raise RunFolderError("there is no run yet; start one with: fedlora run")
            # written once, when the run is made
            return max(folders, key=lambda path: (path / "job.toml").stat().st_mtime_ns)
        folder = self._runs / run
        if not RUN.fullmatch(run) or not folder.is_dir():
            raise RunFolderError(f"there is no run {run[:128]!r}")
        return folder


def _lines(folder: Path, skip: int, stop: threading.Event) -> Iterator[tuple[int, str]]:
    """Whole lines and their numbers from `skip` on, live, until `stop` or the folder is gone."""
    path = folder / "metrics.jsonl"
    due, number, position, inode = skip, 0, 0, 0
    while not stop.is_set() and folder.is_dir():
        block = b""
        with suppress(FileNotFoundError), path.open("rb") as file:
            now = os.fstat(file.fileno())
            # continuing an interrupted run replaces the file by one that begins the same
            if now.st_ino != inode or now.st_size < position:
                inode, number, position = now.st_ino, 0, 0
            file.seek(position)
            block = file.read(MAX_LINE_BYTES)
        end = block.rfind(b"\n") + 1
        position += end
        for line in block[:end].splitlines():
            # half a line of a writer that was killed is no event; and an end is never passed
            # over, for nothing would come after it
            if _is_event(line) and (number >= due or _is_end(line)):
                due = number + 1
                yield number, line.decode("utf-8", "replace")
            number += 1
        if end:
            continue
        if inode:
            # a continued run may have fewer lines than before: what comes next is new
            due = min(due, number)
        if len(block) == MAX_LINE_BYTES:
            raise RunFolderError(f"{path} has a line of more than {MAX_LINE_BYTES} bytes")
        stop.wait(POLL_S)


def _is_event(line: str | bytes) -> bool:
    return _event(line) is not None


def _is_end(line: str | bytes) -> bool:
    return (_event(line) or {}).get("event") in ("end", "failed")


def _event(line: str | bytes) -> Event | None:
    try:
        event = json.loads(line)
    except ValueError:
        return None
    return event if isinstance(event, dict) else None
