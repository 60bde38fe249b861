"""Reading several curves at an equal number of rounds or of bytes, never beyond their ends."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

# an update's manifest writes numbers as text, so equal traffic differs by a few bytes
SLACK = 0.005


@dataclass(frozen=True)
class Evaluated:
    """One evaluated round of one run.

    Attributes:
        round: its number.
        num_bytes: bytes up and down of all clients, from round 1 up to this one.
        value: the score; None where it was not finite.
    """

    round: int
    num_bytes: int
    value: float | None


Curve = Sequence[Evaluated]


def common_round(curves: Iterable[Curve]) -> int | None:
    """The last round that every curve has reached; None if there are no curves."""
    return min((curve[-1].round for curve in curves if curve), default=None)


def common_bytes(curves: Iterable[Curve]) -> int | None:
    """The largest byte budget that every curve has reached; None if there are no curves.

    Traffic that is equal but for `SLACK` counts as equal: of two runs that send the same
    tensors, the one whose numbers take a few bytes more to write must not be read a round
    earlier. So the budget is the largest point of any curve that the shortest curve reaches
    to within `SLACK`.
    """
    known = [curve for curve in curves if curve]
    least = min((curve[-1].num_bytes for curve in known), default=None)
    if least is None:
        return None
    points = (point.num_bytes for curve in known for point in curve)
    return max(count for count in points if count <= least * (1 + SLACK))


def at_round(curve: Curve, rounds: int) -> Evaluated | None:
    """The last evaluated round that is not after `rounds`."""
    return next((point for point in reversed(curve) if point.round <= rounds), None)


def at_bytes(curve: Curve, budget: int) -> Evaluated | None:
    """The last evaluated round that had cost no more than `budget` bytes."""
    return next((point for point in reversed(curve) if point.num_bytes <= budget), None)
