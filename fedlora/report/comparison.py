"""comparison.json: contenders and baselines over seeds and levels of skew, at equal cost."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedlora.errors import RunFolderError
from fedlora.report.equal_reading import Evaluated, at_bytes, at_round, common_bytes, common_round
from fedlora.report.headline import METRICS, Metric
from fedlora.report.paired import Paired, Spread, paired, spread
from fedlora.report.run_folder import drawable, read_object

FORMAT = 2

Run = Mapping[str, Any]


@dataclass(frozen=True)
class Point:
    """One evaluated round over all seeds.

    Attributes:
        num_bytes: mean over seeds of the bytes up and down so far.
        mean, deviation: of the score.
    """

    round: int
    num_bytes: float
    mean: float
    deviation: float | None


@dataclass(frozen=True)
class Entry:
    """All runs of one label at one level.

    Attributes:
        kind: "strategy" or "baseline".
        seeds: of all its runs, in order, also of those that failed.
        failures: seed -> reason, of runs that stopped early; no figure counts them.
        values: seed -> score, read as the comparison says.
        at_rounds: seed -> score at the last round that all strategies evaluated.
        read: the evaluated rounds that `values` come from.
        curve: rounds that every run which did not fail has a score of.
        aggregation_error, bytes_up, bytes_down, server_s: means over runs that did not fail;
            None if unknown.
        difference: paired with the reference; None for the reference itself.
    """

    label: str
    kind: str
    seeds: tuple[int, ...]
    failures: Mapping[int, str]
    values: Mapping[int, float]
    at_rounds: Mapping[int, float]
    read: tuple[Evaluated, ...]
    curve: tuple[Point, ...]
    aggregation_error: float | None
    bytes_up: float | None
    bytes_down: float | None
    server_s: float | None
    difference: Paired | None

    @property
    def spread(self) -> Spread:
        """Over the seeds that have a score."""
        return spread(list(self.values.values()))

    @property
    def mean(self) -> float | None:
        """Mean score over seeds."""
        return self.spread.mean

    @property
    def without_score(self) -> int:
        """Runs that did not fail and yet have no finite score where they are read."""
        return len(self.seeds) - len(self.failures) - len(self.values)


@dataclass(frozen=True)
class Level:
    """The results at one skew.

    Attributes:
        skew: the Dirichlet alpha; None when the job's own division was used.
        rounds: the last round that all strategies evaluated.
        num_bytes: the byte budget, if scores are read at equal bytes.
        entries: in the order they were named, baselines last.
    """

    skew: float | None
    rounds: int | None
    num_bytes: int | None
    entries: tuple[Entry, ...]

    @property
    def name(self) -> str:
        """E.g. "alpha 0.1"; empty for the job's own division."""
        return "" if self.skew is None else f"alpha {skew_text(self.skew)}"

    @property
    def strategies(self) -> list[Entry]:
        """Entries that are not baselines and have a score."""
        return [e for e in self.entries if e.kind != "baseline" and e.values]


@dataclass(frozen=True)
class Comparison:
    """What comparison.json says.

    Attributes:
        equal: "rounds" or "bytes": where scores are read.
        reference: the label that differences are taken to; None if only baselines ran.
        labels: label -> kind, in order.
        own_test: no fixed test file was named, so that every level and seed holds out rows of
            its own and scores of different levels are of different rows.
    """

    name: str
    metric: Metric
    equal: str
    reference: str | None
    labels: Mapping[str, str]
    own_test: bool
    levels: tuple[Level, ...]
    seeds: tuple[int, ...]
    rounds: int
    steps_per_client: int
    machine: Mapping[str, Any]


def skew_text(skew: float) -> str:
    """The shortest text that tells one level from every other."""
    return repr(float(skew)).removesuffix(".0")


def read_comparison(folder: Path) -> Comparison:
    """Reads comparison.json.

    Raises:
        RunFolderError: it is missing, cannot be parsed, or lacks a field.
    """
    path = folder / "comparison.json"
    return parse_comparison(read_object(path), str(path))


def parse_comparison(found: Mapping[str, Any], source: str = "comparison.json") -> Comparison:
    """The comparison in a tree of plain values, with everything that follows from its runs.

    Args:
        found: what comparison.json holds.
        source: its name, for errors.

    Raises:
        RunFolderError: another format, or a field is missing.
    """
    if found.get("format") != FORMAT:
        raise RunFolderError(
            f"{source} has format {found.get('format')!r}, this version reads {FORMAT}; give the "
            "same fedlora compare command again to write it anew (finished runs are kept)"
        )
    try:
        metric = METRICS[found["metric"]]
        kinds = {str(c["label"]): str(c["kind"]) for c in found["contenders"]}
        reference = found["reference"]
        return Comparison(
            name=str(found["name"]),
            metric=metric,
            equal=str(found["equal"]),
            reference=reference,
            labels=kinds,
            own_test=bool(found["own_test"]),
            levels=tuple(
                _level(
                    skew,
                    [run for run in found["runs"] if run["skew"] == skew],
                    kinds,
                    str(found["equal"]),
                    reference,
                )
                for skew in found["levels"]
            ),
            seeds=tuple(found["seeds"]),
            rounds=int(found["rounds"]),
            steps_per_client=int(found["steps_per_client"]),
            machine=found.get("machine") or {},
        )
    except (KeyError, TypeError, ValueError) as e:
        raise RunFolderError(
            f"{source} is not a comparison: {type(e).__name__} {e}; run the comparison again"
        ) from e


def _level(
    skew: float | None,
    runs: Sequence[Run],
    kinds: Mapping[str, str],
    equal: str,
    reference: str | None,
) -> Level:
    by_label: dict[str, list[Run]] = {label: [] for label in kinds}
    for run in sorted(runs, key=lambda run: int(run["seed"])):
        by_label[str(run["label"])].append(run)
    # a failed run would drag the budget of all others down to where it stopped
    competing = [
        _evaluated(run) for run in runs if kinds[run["label"]] != "baseline" and _done(run)
    ]
    others = [_evaluated(run) for run in runs if _done(run)]
    rounds = common_round(competing or others)
    num_bytes = common_bytes(competing) if equal == "bytes" else None

    read = {
        label: _read(by_label[label], kind, equal, rounds, num_bytes)
        for label, kind in kinds.items()
    }
    yardstick = _values(read[reference]) if reference is not None else {}
    entries = []
    for label, kind in kinds.items():
        mine = by_label[label]
        done = [run for run in mine if _done(run)]
        values = _values(read[label])
        entries.append(
            Entry(
                label=label,
                kind=kind,
                seeds=tuple(int(run["seed"]) for run in mine),
                failures={int(r["seed"]): str(r["reason"]) for r in mine if not _done(r)},
                values=values,
                at_rounds=_values(_read(mine, kind, "rounds", rounds, None)),
                read=tuple(read[label].values()),
                curve=tuple(_mean_curve(done)),
                aggregation_error=_mean(done, "aggregation_error"),
                bytes_up=_mean(done, "bytes_up"),
                bytes_down=_mean(done, "bytes_down"),
                server_s=_mean(done, "server_s"),
                difference=None if label == reference else paired(values, yardstick),
            )
        )
    return Level(skew, rounds, num_bytes, tuple(entries))


def _read(
    runs: Sequence[Run], kind: str, equal: str, rounds: int | None, num_bytes: int | None
) -> dict[int, Evaluated]:
    found = {}
    for run in filter(_done, runs):
        point = None
        if equal == "rounds":
            point = None if rounds is None else at_round(_evaluated(run), rounds)
        elif kind != "baseline":
            # a baseline sends nothing, so no number of bytes is its own
            point = None if num_bytes is None else at_bytes(_evaluated(run), num_bytes)
        if point is not None:
            found[int(run["seed"])] = point
    return found


def _values(read: Mapping[int, Evaluated]) -> dict[int, float]:
    return {seed: point.value for seed, point in read.items() if point.value is not None}


def _done(run: Run) -> bool:
    return bool(run["status"] == "done")


def _evaluated(run: Run) -> list[Evaluated]:
    return [Evaluated(int(p["round"]), int(p["bytes"]), drawable(p["value"])) for p in run["curve"]]


def _mean_curve(runs: Sequence[Run]) -> list[Point]:
    values: dict[int, list[float]] = defaultdict(list)
    sizes: dict[int, list[int]] = defaultdict(list)
    for run in runs:
        for point in _evaluated(run):
            if point.value is not None:
                values[point.round].append(point.value)
                sizes[point.round].append(point.num_bytes)
    points = []
    for number in sorted(values):
        # a mean over fewer runs would jump where one of them diverged
        if len(values[number]) == len(runs):
            found = spread(values[number])
            assert found.mean is not None
            points.append(Point(number, _average(sizes[number]), found.mean, found.deviation))
    return points


def _mean(runs: Sequence[Run], key: str) -> float | None:
    values = [float(run[key]) for run in runs if run.get(key) is not None]
    return _average(values) if values else None


def _average(values: Sequence[float]) -> float:
    return sum(values) / len(values)
