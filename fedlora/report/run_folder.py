"""A run folder as the report reads it: job, events and summary, also of an unfinished run."""

import json
import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedlora.errors import RunFolderError

Event = Mapping[str, Any]


@dataclass(frozen=True)
class RunRecord:
    """What is known about one run.

    Attributes:
        name: name of the run.
        job_text: job.toml as it stands in the folder.
        job: the same, parsed.
        events: whole lines of metrics.jsonl.
        summary: summary.json, or empty.
    """

    name: str
    job_text: str
    job: Mapping[str, Any]
    events: tuple[Event, ...]
    summary: Mapping[str, Any]

    @property
    def task(self) -> str:
        """`model.task` of the job."""
        return str(self.section("model").get("task", "causal-lm"))

    @property
    def start(self) -> Event:
        """The start event; empty before the run wrote it."""
        return next(iter(self.of("start")), {})

    @property
    def clients(self) -> Mapping[str, Mapping[str, Any]]:
        """Facts of each client, by name."""
        found = self.start.get("clients") or {}
        assert isinstance(found, Mapping)
        return found

    @property
    def rounds(self) -> list[Event]:
        """Committed rounds in order; a round that was repeated counts once, the last time."""
        latest = {int(event["round"]): event for event in self.of("round") if "round" in event}
        return [latest[number] for number in sorted(latest)]

    @property
    def num_planned(self) -> int:
        """Rounds that the job asks for."""
        planned = self.start.get("rounds") or self.section("federation").get("rounds") or 0
        return int(planned)

    @property
    def last_round(self) -> int:
        """The last committed round; 0 before the first."""
        rounds = self.rounds
        return int(rounds[-1]["round"]) if rounds else 0

    @property
    def finished(self) -> bool:
        """All rounds are committed."""
        return 0 < self.num_planned <= self.last_round

    @property
    def scores(self) -> Mapping[str, Any]:
        """The summary, or what the events say in its place."""
        evals = [event["eval"] for event in self.rounds if event.get("eval")]
        return {
            "personal": bool(self.start.get("personal")),
            "base": self.start.get("eval") or {},
            "global": evals[-1] if evals else {},
            **{key: value for key, value in self.summary.items() if value},
        }

    def of(self, kind: str) -> list[Event]:
        """Events of one kind, in order."""
        return [event for event in self.events if event.get("event") == kind]

    def section(self, name: str) -> Mapping[str, Any]:
        """One table of the job."""
        found = self.job.get(name) or {}
        return found if isinstance(found, Mapping) else {}


def read_run(folder: Path) -> RunRecord:
    """Reads a run folder.

    Raises:
        RunFolderError: job.toml is missing or a file cannot be parsed.
    """
    path = folder / "job.toml"
    try:
        job_text = path.read_text("utf-8")
        job = tomllib.loads(job_text)
    except FileNotFoundError as e:
        raise RunFolderError(
            f"{folder} is not a run folder: job.toml is missing; name the folder that "
            "fedlora run wrote"
        ) from e
    except (OSError, ValueError) as e:
        raise RunFolderError(f"{path} cannot be read: {e}; restore the run folder") from e
    name = str((job.get("run") or {}).get("name", folder.name))
    summary = folder / "summary.json"
    found = read_object(summary) if summary.exists() else {}
    return RunRecord(name, job_text, job, read_events(folder / "metrics.jsonl"), found)


def read_events(path: Path) -> tuple[Event, ...]:
    """Whole lines of a metrics file; a line that a crash cut off is left out."""
    try:
        lines = path.read_text("utf-8", errors="replace").split("\n")
    except FileNotFoundError:
        return ()
    except OSError as e:
        raise RunFolderError(f"{path} cannot be read: {e}; restore the run folder") from e
    events = []
    for line in lines:
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict):
            events.append(event)
    return tuple(events)


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        RunFolderError: the file is missing or holds something else.
    """
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as e:
        raise RunFolderError(f"{path} cannot be read: {e}; write it again") from e
    if not isinstance(found, dict):
        raise RunFolderError(f"{path} holds a {type(found).__name__}; expected a JSON object")
    return found


def drawable(value: Any) -> float | None:
    """A number that a picture can show; None for anything else.

    Clients report some of the numbers, so infinite and absurd ones must not spoil an axis.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) and abs(value) < 1e15 else None
