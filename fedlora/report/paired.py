"""Spread over seeds, and paired differences with Student's interval."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Spread:
    """Several values of one figure.

    Attributes:
        mean: None without values.
        deviation: sample standard deviation (divisor n - 1); None with fewer than two values.
        count: n.
    """

    mean: float | None
    deviation: float | None
    count: int


@dataclass(frozen=True)
class Paired:
    """Mean of the differences between two contenders, seed by seed.

    Attributes:
        mean: mean of (value - reference) over the seeds that both have.
        error: its standard error, s / sqrt(n); None with one pair.
        low, high: two-sided interval of Student's t with n - 1 degrees of freedom; None with
            one pair.
        count: n, the number of pairs.
    """

    mean: float
    error: float | None
    low: float | None
    high: float | None
    count: int

    @property
    def clear(self) -> bool:
        """The interval exists and does not hold zero."""
        return self.low is not None and self.high is not None and not self.low <= 0 <= self.high


def spread(values: Sequence[float]) -> Spread:
    """Mean and sample standard deviation."""
    return Spread(
        statistics.fmean(values) if values else None,
        statistics.stdev(values) if len(values) > 1 else None,
        len(values),
    )


def paired(
    values: Mapping[int, float], reference: Mapping[int, float], confidence: float = CONFIDENCE
) -> Paired | None:
    """The paired difference over the keys (seeds) that both have; None without any.

    Pairs share the division of the data and every draw that does not depend on the strategy,
    so that most of the spread over seeds cancels. The interval assumes that the differences
    are about normal; it is for one pair of contenders, not corrected for several.

    Source: Student, The Probable Error of a Mean, Biometrika 6 (1908), sections 8 and 9.
    """
    differences = [values[key] - reference[key] for key in sorted(values.keys() & reference.keys())]
    if not differences:
        return None
    found = spread(differences)
    assert found.mean is not None
    if found.deviation is None:
        return Paired(found.mean, None, None, None, found.count)
    # scipy.stats takes a second to import, which one seed must not pay
    from scipy.stats import t

    error = found.deviation / math.sqrt(found.count)
    half = float(t.ppf((1 + confidence) / 2, found.count - 1)) * error
    return Paired(found.mean, error, found.mean - half, found.mean + half, found.count)
