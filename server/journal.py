"""Journal: the events of a run, one JSON object per line."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

from fedlora.storage import storage_errors, write_atomic

Event = dict[str, Any]


class Journal:
    """A file of events.

    Args:
        path: of the file, which need not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, event: Event) -> None:
        """One more line.

        Raises:
            StorageError: the disk refused.
        """
        line = json.dumps(event, sort_keys=True).encode() + b"\n"
        with storage_errors(self.path), self.path.open("ab+") as file:
            # half a line, of a writer that was killed, would swallow this one
            if file.tell() and not _ends_line(file):
                line = b"\n" + line
            file.write(line)

    def read(self) -> list[Event]:
        """All whole lines."""
        events: list[Event] = []
        try:
            lines = self.path.read_bytes().splitlines()
        except FileNotFoundError:
            return events
        for line in lines:
            try:
                event = json.loads(line)
            except ValueError:
                continue
            if isinstance(event, dict):
                events.append(event)
        return events

    def reopen(self) -> None:
        """Takes back that the run has ended early, for it is continued.

        Raises:
            StorageError: the disk refused.
        """
        events = self.read()
        kept = [event for event in events if event.get("event") != "failed"]
        if kept != events:
            write_atomic(self.path, encode_events(kept))


def _ends_line(file: BinaryIO) -> bool:
    file.seek(-1, os.SEEK_END)
    return file.read(1) == b"\n"


def encode_events(events: Sequence[Event]) -> bytes:
    """The lines of a journal."""
    return "".join(json.dumps(event, sort_keys=True) + "\n" for event in events).encode()
