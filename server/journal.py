"""Journal: the events of a run, one JSON object per line."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
        with storage_errors(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(event, sort_keys=True) + "\n")

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


def encode_events(events: Sequence[Event]) -> bytes:
    """The lines of a journal."""
    return "".join(json.dumps(event, sort_keys=True) + "\n" for event in events).encode()
