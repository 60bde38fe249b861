"""TIES: trim small entries, elect a sign per entry, and average what agrees with it.

Yadav et al., "TIES-Merging: Resolving Interference When Merging Models",
https://arxiv.org/abs/2306.01708, section 4. Trimming is by one threshold per adapter over
the entries of all its layers; on the entries of A and B it would be another method.

Differs from the released code where the trimmed entries cancel exactly: there the sign that
most entries of the model have wins, here none does and the entry is 0.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedlora.linalg import Pair
from fedlora.merging.base import Given, Merger, check_finite, check_range
from fedlora.merging.dense import magnitude_threshold, row_blocks, to_lora


@dataclass(frozen=True)
class Ties(Merger):
    """The result has full rank in general; a rank cuts its SVD.

    Attributes:
        density: fraction of entries that trimming keeps, the paper's k.
        scaling: the paper's lambda.
    """

    full_rank: ClassVar[bool] = True

    density: float = 0.2
    scaling: float = 1.0

    def __post_init__(self) -> None:
        check_range("density", self.density, 0.0 < self.density <= 1.0, "above 0, at most 1")
        check_finite("scaling", self.scaling)

    def merge(self, given: Given) -> dict[str, Pair]:
        thresholds = [
            magnitude_threshold([changes[i] for changes in given.layers.values()], self.density)
            for i in range(len(given.weights))
        ]
        weights = torch.tensor(given.weights, dtype=torch.float64)[:, None, None]
        merged = {}
        for name, changes in given.layers.items():
            rows = []
            for block in row_blocks(changes):
                trimmed = [
                    torch.where(part.float().abs() >= threshold, part, 0.0)
                    for part, threshold in zip(block, thresholds, strict=True)
                ]
                rows.append(self.scaling * disjoint_mean(torch.stack(trimmed), weights))
            merged[name] = to_lora(torch.cat(rows), given.rank)
        return merged


def disjoint_mean(values: Tensor, weights: Tensor) -> Tensor:
    """The weighted mean, entry by entry, of the values that have the sign of the weighted sum.

    Args:
        values: (n, ...); 0 stands for no value.
        weights: broadcastable to `values`, positive.
    """
    elected = (weights * values).sum(0).sign()
    agree = weights * ((values.sign() == elected) & (elected != 0))
    mass = agree.sum(0)
    return (agree * values).sum(0) / mass.where(mass > 0, 1.0)
