"""The figures of a run: their names, which direction is better, and how they are written."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

MISSING = "–"


@dataclass(frozen=True)
class Metric:
    """One figure.

    Attributes:
        key: its name in a mapping of scores.
        name: what a reader sees.
        higher_better: the direction of improvement.
        decimals: digits after the point.
        percent: the value is a fraction and is written in percent.
    """

    key: str
    name: str
    higher_better: bool
    decimals: int = 4
    percent: bool = False

    def format(self, value: float | None) -> str:
        """The value as text; a dash where there is none."""
        if value is None:
            return MISSING
        if not math.isfinite(value):
            return "not finite"
        if abs(value) >= 1e7:
            return f"{value:.3g}"
        if self.percent:
            return f"{100 * value:.{self.decimals}f} %"
        return f"{value:.{self.decimals}f}"

    def format_difference(self, value: float) -> str:
        """The size of a difference, without a sign; percentages differ by points."""
        if self.percent:
            return f"{100 * abs(value):.{self.decimals}f} points"
        return self.format(abs(value))

    def gain(self, value: float, reference: float) -> float:
        """How much better `value` is than `reference`; negative when it is worse."""
        return value - reference if self.higher_better else reference - value

    def best(self, values: Sequence[float | None]) -> set[int]:
        """Positions of the best value, several on a tie; none when fewer than two compare."""
        known = {i: v for i, v in enumerate(values) if v is not None and math.isfinite(v)}
        if len(known) < 2:
            return set()
        top = max(known.values()) if self.higher_better else min(known.values())
        return {i for i, v in known.items() if v == top}


METRICS = {
    metric.key: metric
    for metric in (
        Metric("bits_per_byte", "bits per byte", higher_better=False),
        Metric("accuracy", "accuracy", higher_better=True, decimals=2, percent=True),
        Metric("loss", "loss", higher_better=False),
        Metric("perplexity", "perplexity", higher_better=False, decimals=3),
        Metric("exact_match", "exact match", higher_better=True, decimals=2, percent=True),
    )
}


def headline(task: str, scores: Mapping[str, float] | None = None) -> Metric:
    """The metric that a task is judged by.

    Args:
        task: `model.task` of a job.
        scores: figures that exist; where the task's own metric is not among them, the loss
            takes its place (text without a byte count has no bits per byte).
    """
    metric = METRICS["bits_per_byte" if task == "causal-lm" else "accuracy"]
    if scores and metric.key not in scores and "loss" in scores:
        return METRICS["loss"]
    return metric
