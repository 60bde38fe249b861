"""runs.csv, curves.csv and summary.csv: a comparison with full precision and fixed columns."""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fedlora.report.comparison import Comparison, Entry, Level
from fedlora.report.headline import METRICS
from fedlora.report.paired import spread

RUN_COLUMNS = (
    "label",
    "kind",
    "skew",
    "seed",
    "status",
    "rounds",
    *METRICS,
    "aggregation_error",
    "bytes_up",
    "bytes_down",
    "server_s",
    "reason",
)
CURVE_COLUMNS = (
    "label",
    "kind",
    "skew",
    "seed",
    "status",
    "round",
    "steps",
    "bytes",
    *METRICS,
    "aggregation_error",
)
SUMMARY_COLUMNS = (
    "label",
    "kind",
    "skew",
    "metric",
    "equal",
    "budget",
    "first_round",
    "last_round",
    "mean",
    "sd",
    "n",
    "failed",
    "without_score",
    "reference",
    "difference",
    "se",
    "ci_low",
    "ci_high",
    "pairs",
    "mean_at_equal_rounds",
    "equal_round",
    "aggregation_error",
    "bytes_up",
    "bytes_down",
    "server_s",
)


def runs_csv(found: Mapping[str, Any]) -> str:
    """One row per run, with its final scores; those of a failed run are empty.

    Args:
        found: what comparison.json holds.
    """
    return _csv(RUN_COLUMNS, ({**run, **run["final"]} for run in found["runs"]))


def curves_csv(found: Mapping[str, Any]) -> str:
    """One row per evaluated round, also of runs that failed later.

    Args:
        found: what comparison.json holds.
    """
    rows = (
        {**{key: run[key] for key in CURVE_COLUMNS[:5]}, **point, **point["scores"]}
        for run in found["runs"]
        for point in run["curve"]
    )
    return _csv(CURVE_COLUMNS, rows)


def summary_csv(comparison: Comparison) -> str:
    """One row per label and level of skew."""
    return _csv(SUMMARY_COLUMNS, summary_rows(comparison))


def summary_rows(comparison: Comparison) -> list[dict[str, Any]]:
    """One mapping per label and level of skew, with `SUMMARY_COLUMNS` as keys.

    "budget" is a round or a number of bytes, as "equal" says; "first_round" and "last_round"
    are the evaluated rounds read (they differ when seeds differ); differences are score minus
    the reference's, paired by seed. What is unknown is None.
    """
    return [
        _summary(comparison, level, entry) for level in comparison.levels for entry in level.entries
    ]


def _summary(comparison: Comparison, level: Level, entry: Entry) -> dict[str, Any]:
    rounds = [point.round for point in entry.read]
    found, difference = entry.spread, entry.difference
    equal_rounds = list(entry.at_rounds.values())
    return {
        "label": entry.label,
        "kind": entry.kind,
        "skew": level.skew,
        "metric": comparison.metric.key,
        "equal": comparison.equal,
        "budget": level.num_bytes if comparison.equal == "bytes" else level.rounds,
        "first_round": min(rounds, default=None),
        "last_round": max(rounds, default=None),
        "mean": found.mean,
        "sd": found.deviation,
        "n": found.count,
        "failed": len(entry.failures),
        "without_score": entry.without_score,
        "reference": comparison.reference,
        "difference": difference and difference.mean,
        "se": difference and difference.error,
        "ci_low": difference and difference.low,
        "ci_high": difference and difference.high,
        "pairs": difference and difference.count,
        "mean_at_equal_rounds": spread(equal_rounds).mean,
        "equal_round": level.rounds,
        "aggregation_error": entry.aggregation_error,
        "bytes_up": entry.bytes_up,
        "bytes_down": entry.bytes_down,
        "server_s": entry.server_s,
    }


def _csv(columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        writer.writerow([_cell(row.get(column)) for column in columns])
    return buffer.getvalue()


def _cell(value: Any) -> str:
    # repr of a float is the shortest text that reads back as the same number
    return "" if value is None else repr(value) if isinstance(value, float) else str(value)
