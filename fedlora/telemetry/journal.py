"""JournalMetrics: the figures of runs that other processes work on, read from their journals."""

import json
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import Metric

from fedlora.telemetry.run import RunMetrics


class JournalMetrics:
    """A collector that reads what has been added to the journals whenever it is asked.

    A journal that was rewritten (after a crash it is brought in line with what was committed)
    or is no longer there makes it begin anew, so that nothing is counted twice.

    Args:
        journals: path -> name of the run, of every run that is shown.
    """

    def __init__(self, journals: Callable[[], Mapping[Path, str]]) -> None:
        self._journals = journals
        self._lock = threading.Lock()
        self._begin()

    def collect(self) -> Iterable[Metric]:
        """The figures of all runs."""
        with self._lock:
            journals = self._journals()
            if not self._catch_up(journals):
                self._begin()
                self._catch_up(journals)
            return list(self._registry.collect())

    def _begin(self) -> None:
        self._registry = CollectorRegistry()
        self._metrics = RunMetrics(self._registry)
        # path -> where the last line that was counted begins, and that line
        self._counted: dict[Path, tuple[int, bytes]] = {}

    def _catch_up(self, journals: Mapping[Path, str]) -> bool:
        """Counts what is new; False if something that was counted no longer stands."""
        if self._counted.keys() - journals.keys():
            return False
        for path, run in journals.items():
            start, last = self._counted.get(path, (0, b""))
            data = _read(path, start)
            if not data.startswith(last):
                return False
            lines = data[: data.rfind(b"\n") + 1].splitlines(keepends=True)
            for line in lines[1 if last else 0 :]:
                self._metrics.take(_event(line), run)
            if lines:
                start += sum(map(len, lines[:-1]))
                self._counted[path] = (start, lines[-1])
        return True


def _read(path: Path, start: int) -> bytes:
    try:
        with path.open("rb") as file:
            file.seek(start)
            return file.read()
    except FileNotFoundError:
        return b""


def _event(line: bytes) -> dict[str, Any]:
    try:
        event = json.loads(line)
    except ValueError:
        return {}
    return event if isinstance(event, dict) else {}
