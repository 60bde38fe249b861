"""metrics.jsonl: one JSON object per line, a projection of what was committed."""

from fedlora.checkpoint import RunStore
from fedlora.server.journal import ENDS, Journal, encode_events
from fedlora.storage import write_atomic


class MetricsLog(Journal):
    """A journal that is brought back to what the rounds' records say after a crash."""

    def reconcile(self, store: RunStore, head: int) -> None:
        """Drops what was not committed, adds what was committed but not written.

        What says that the run has ended goes too, for it is continued.
        """
        kept = [e for e in self.read() if e.get("round", 0) <= head and e["event"] not in ENDS]
        rounds = {e["round"] for e in kept if e.get("event") in ("start", "round")}
        for number in range(head + 1):
            record = store.record(number)
            if number not in rounds and record is not None:
                kept = [e for e in kept if e.get("round") != number] + record["events"]
        kept.sort(key=lambda event: int(event.get("round", 0)))
        text = encode_events(kept)
        # bytes, not events: a half line at the end would swallow the next one
        if not self.path.is_file() or text != self.path.read_bytes():
            write_atomic(self.path, text)
