"""Merger: one way to make one low-rank change of several, all trained on the same base.

A merge happens once, after training, on one machine: no rounds, no clients. Everything is
float64 on the CPU. A change is a pair (L (d, r), Q (r, k)) of scale 1, so L Q is what is
added to the base weight; ranks may differ between adapters and layers.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from fedlora.errors import ConfigError
from fedlora.linalg import Pair, truncate


@dataclass(frozen=True)
class Given:
    """What is merged.

    Attributes:
        layers: layer -> the change of each adapter, in the order of `weights`.
        weights: one per adapter, positive, of sum 1.
        rank: rank of the result; None leaves it to the merger.
        seed: for mergers that draw.
        grams: layer -> per adapter the mean of x x^T (k, k) over the layer's inputs x; empty
            unless the merger needs data.
    """

    layers: Mapping[str, tuple[Pair, ...]]
    weights: tuple[float, ...]
    rank: int | None = None
    seed: int = 0
    grams: Mapping[str, tuple[Tensor, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Merger(ABC):
    """A merging method; the fields of a subclass are its options.

    Attributes:
        needs_data: it needs `Given.grams`.
        full_rank: the result can have a larger rank than the sum of those it is made of.
    """

    needs_data: ClassVar[bool] = False
    full_rank: ClassVar[bool] = False

    @abstractmethod
    def merge(self, given: Given) -> dict[str, Pair]:
        """The merged change of every layer, of rank `given.rank` where that is set.

        A layer whose adapters have a smaller sum of ranks keeps that sum, unless `full_rank`.

        Raises:
            ConfigError: the rank does not suit the method.
        """


def reduce_rank(change: Pair, rank: int | None) -> Pair:
    """The best approximation of `change` of the given rank; `change` itself if it has no more."""
    if rank is None or rank >= change[1].shape[0]:
        return change
    b, a, _ = truncate(*change, rank, split="balanced")
    return b, a


def check_finite(option: str, value: float) -> None:
    """Raises ConfigError unless an option is a finite number."""
    if not math.isfinite(value):
        raise ConfigError(f"option {option} = {value} is not a finite number")


def check_range(option: str, value: float, inside: bool, expected: str) -> None:
    """Raises ConfigError unless `value` is `inside` what is `expected`."""
    if not inside:
        raise ConfigError(f"option {option} = {value:g}; expected a number {expected}")
