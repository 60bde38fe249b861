"""Finding: what an oracle says, and how it comes from many single deviations."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

FALSE_ALARM = 1e-8
"""Probability that one statistical oracle fails correct training; Bonferroni within it."""
# noise multiplier, clip norm and expected batch, of which no two coincide, nor their products
SIGMA, CLIP, EXPECTED = 1.5, 0.4, 3.0


@dataclass(frozen=True)
class Finding:
    """What an oracle found.

    Attributes:
        oracle: its name.
        passed: whether the figure is within the tolerance.
        figure: largest deviation that was seen.
        tolerance: largest deviation that is allowed.
        detail: of what, and where.
    """

    oracle: str
    passed: bool
    figure: float
    tolerance: float
    detail: str


class Worst:
    """The largest of many deviations, each over its tolerance."""

    def __init__(self, oracle: str) -> None:
        self.oracle = oracle
        self.seen: list[tuple[float, float, str]] = []

    def see(self, figure: float, tolerance: float, detail: str) -> None:
        self.seen.append((figure if math.isfinite(figure) else math.inf, tolerance, detail))

    def finding(self) -> Finding:
        figure, tolerance, detail = max(self.seen, key=lambda one: one[0] / one[1])
        return Finding(self.oracle, figure <= tolerance, figure, tolerance, detail)


def flat(tensors: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)])


def norm(tensors: Mapping[str, Tensor]) -> float:
    return float(flat(tensors).norm())
