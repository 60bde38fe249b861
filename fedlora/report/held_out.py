"""Rows of the comparison on the held-out set: base, local-only, federated, centralised."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedlora.report.headline import METRICS, Metric, headline

Scores = Mapping[str, float]


@dataclass(frozen=True)
class Row:
    """One model and its figures on the held-out set."""

    key: str
    name: str
    scores: Scores


def held_out_rows(summary: Mapping[str, Any]) -> list[Row]:
    """Those models that `summary` has figures of."""
    local = baseline(summary, "local")
    federated = "federated, own (mean)" if summary.get("personal") else "federated"
    return [
        Row(key, name, scores)
        for key, name, scores in (
            ("base", "base model", summary.get("base")),
            ("local", "local-only (mean)", local.get("mean")),
            ("federated", federated, summary.get("global")),
            ("centralised", "centralised", baseline(summary, "centralised").get("final")),
        )
        if scores
    ]


def baseline(summary: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """What is known of one baseline; empty when it was not run."""
    found = (summary.get("baselines") or {}).get(name) or {}
    assert isinstance(found, Mapping)
    return found


def columns(task: str, rows: Sequence[Row]) -> list[Metric]:
    """The metrics that any row has, the headline first."""
    present = {key for row in rows for key in row.scores}
    first = headline(task, dict.fromkeys(present, 0.0))
    return [first, *(m for m in METRICS.values() if m.key in present and m != first)]
