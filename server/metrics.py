"""metrics.jsonl: one JSON object per line, a projection of what was committed."""

import json
from pathlib import Path

from fedlora.checkpoint import RunStore
from fedlora.server.run_parts import Event
from fedlora.storage import storage_errors, write_atomic


class MetricsLog:
    """Appends events; after a crash it is brought back to what the rounds' records say."""

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
            write_atomic(self.path, _lines(kept))

    def reconcile(self, store: RunStore, head: int) -> None:
        """Drops what was not committed, adds what was committed but not written."""
        kept = [e for e in self.read() if e.get("round", 0) <= head and e.get("event") != "end"]
        rounds = {e["round"] for e in kept if e.get("event") in ("start", "round")}
        for number in range(head + 1):
            record = store.record(number)
            if number not in rounds and record is not None:
                kept = [e for e in kept if e.get("round") != number] + record["events"]
        kept.sort(key=lambda event: int(event.get("round", 0)))
        text = _lines(kept)
        # bytes, not events: a half line at the end would swallow the next one
        if not self.path.is_file() or text != self.path.read_bytes():
            write_atomic(self.path, text)


def _lines(events: list[Event]) -> bytes:
    return "".join(json.dumps(event, sort_keys=True) + "\n" for event in events).encode()
