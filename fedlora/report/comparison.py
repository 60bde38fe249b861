"""comparison.json: runs of several strategies and baselines over several seeds."""

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedlora.errors import RunFolderError
from fedlora.report.headline import METRICS, Metric
from fedlora.report.run_folder import drawable, read_object

Run = Mapping[str, Any]


@dataclass(frozen=True)
class Point:
    """One round of a curve over all seeds that have it."""

    round: int
    num_bytes: float
    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Entry:
    """All runs of one label.

    Attributes:
        kind: "strategy" or "baseline".
        seeds: of its runs, in order.
        finals: the final score of each run that has one.
        curve: mean and range over seeds by round.
        aggregation_error, bytes_up, bytes_down, server_s: means over runs; None if unknown.
    """

    label: str
    kind: str
    seeds: tuple[int, ...]
    finals: tuple[float, ...]
    curve: tuple[Point, ...]
    aggregation_error: float | None
    bytes_up: float | None
    bytes_down: float | None
    server_s: float | None

    @property
    def mean(self) -> float | None:
        """Mean final score over seeds."""
        return statistics.fmean(self.finals) if self.finals else None

    @property
    def deviation(self) -> float | None:
        """Sample standard deviation over seeds; None with fewer than two."""
        return statistics.stdev(self.finals) if len(self.finals) > 1 else None


@dataclass(frozen=True)
class Comparison:
    """What comparison.json says, strategies first and the best of each kind first."""

    name: str
    metric: Metric
    entries: tuple[Entry, ...]
    seeds: tuple[int, ...]
    rounds: int
    steps_per_client: int
    machine: Mapping[str, Any]

    @property
    def strategies(self) -> list[Entry]:
        """Entries that are not baselines and have a score."""
        return [e for e in self.entries if e.kind != "baseline" and e.finals]


def read_comparison(folder: Path) -> Comparison:
    """Reads comparison.json.

    Raises:
        RunFolderError: it is missing, cannot be parsed, or lacks a field.
    """
    path = folder / "comparison.json"
    found = read_object(path)
    try:
        metric = METRICS[found["metric"]]
        by_label: dict[str, list[Run]] = defaultdict(list)
        for run in found["runs"]:
            by_label[str(run["label"])].append(run)
        entries = [_entry(label, runs, metric) for label, runs in by_label.items()]
        return Comparison(
            name=str(found["name"]),
            metric=metric,
            entries=tuple(sorted(entries, key=lambda entry: _order(entry, metric))),
            seeds=tuple(found["seeds"]),
            rounds=int(found["rounds"]),
            steps_per_client=int(found["steps_per_client"]),
            machine=found.get("machine") or {},
        )
    except (KeyError, TypeError, ValueError) as e:
        raise RunFolderError(
            f"{path} is not a comparison: {type(e).__name__} {e}; run the comparison again"
        ) from e


def _entry(label: str, runs: Sequence[Run], metric: Metric) -> Entry:
    runs = sorted(runs, key=lambda run: int(run["seed"]))
    finals = [_final(run, metric) for run in runs]
    return Entry(
        label=label,
        kind=str(runs[0]["kind"]),
        seeds=tuple(int(run["seed"]) for run in runs),
        finals=tuple(value for value in finals if value is not None),
        curve=tuple(_curve(runs)),
        aggregation_error=_mean(runs, "aggregation_error"),
        bytes_up=_mean(runs, "bytes_up"),
        bytes_down=_mean(runs, "bytes_down"),
        server_s=_mean(runs, "server_s"),
    )


def _final(run: Run, metric: Metric) -> float | None:
    value = drawable((run.get("final") or {}).get(metric.key))
    curve = run.get("curve") or []
    return drawable(curve[-1]["value"]) if value is None and curve else value


def _curve(runs: Sequence[Run]) -> list[Point]:
    values: dict[int, list[float]] = defaultdict(list)
    sizes: dict[int, list[float]] = defaultdict(list)
    for run in runs:
        for point in run.get("curve") or []:
            value = drawable(point["value"])
            if value is not None:
                values[int(point["round"])].append(value)
                # traffic has no bound above which it is absurd
                sizes[int(point["round"])].append(float(point.get("bytes") or 0))
    return [
        Point(number, statistics.fmean(sizes[number]), statistics.fmean(v), min(v), max(v))
        for number, v in sorted(values.items())
    ]


def _mean(runs: Sequence[Run], key: str) -> float | None:
    values = [float(run[key]) for run in runs if run.get(key) is not None]
    return statistics.fmean(values) if values else None


def _order(entry: Entry, metric: Metric) -> tuple[bool, float, str]:
    mean = entry.mean
    if mean is None:
        return entry.kind == "baseline", float("inf"), entry.label
    return entry.kind == "baseline", -mean if metric.higher_better else mean, entry.label
