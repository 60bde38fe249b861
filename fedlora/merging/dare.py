"""DARE: drop entries of each change at random and rescale the rest, then add up.

Yu et al., "Language Models are Super Mario: Absorbing Abilities from Homologous Models as a
Free Lunch", https://arxiv.org/abs/2311.03099, section 3.2, with task arithmetic as the sum.
Entries of dW are dropped: the product of two thinned factors is something else.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from fedlora.linalg import Pair
from fedlora.merging.base import Given, Merger, check_finite, check_range
from fedlora.merging.dense import row_blocks, to_lora
from fedlora.seeds import generator


@dataclass(frozen=True)
class Dare(Merger):
    """Scaling * sum_i w_i (mask_i dW_i) / (1 - drop); its mean over seeds is task arithmetic.

    The result has full rank in general; a rank cuts its SVD.

    Attributes:
        drop: probability that an entry is dropped, the paper's p.
        scaling: factor of the sum.
    """

    full_rank: ClassVar[bool] = True

    drop: float = 0.5
    scaling: float = 1.0

    def __post_init__(self) -> None:
        check_range("drop", self.drop, 0.0 <= self.drop < 1.0, "from 0 to below 1")
        check_finite("scaling", self.scaling)

    def merge(self, given: Given) -> dict[str, Pair]:
        merged = {}
        for name, changes in given.layers.items():
            streams = [generator(given.seed, "dare", name, i) for i in range(len(changes))]
            factors = [self.scaling * w / (1.0 - self.drop) for w in given.weights]
            rows = []
            for block in row_blocks(changes):
                total = torch.zeros_like(block[0])
                for part, stream, factor in zip(block, streams, factors, strict=True):
                    kept = torch.rand(part.shape, generator=stream) >= self.drop
                    total += factor * torch.where(kept, part, 0.0)
                rows.append(total)
            merged[name] = to_lora(torch.cat(rows), given.rank)
        return merged
