"""FLoRA: the factors are stacked, whose product is the exact weighted mean of the changes.

Wang et al., "FLoRA: Federated Fine-Tuning Large Language Models with Heterogeneous Low-Rank
Adaptations", https://arxiv.org/abs/2409.05976, section 3.2.
"""

from dataclasses import dataclass

from fedlora.linalg import Pair, stack
from fedlora.merging.base import Given, Merger, reduce_rank


@dataclass(frozen=True)
class Flora(Merger):
    """Sum_i w_i dW_i of rank sum_i r_i; with a rank, the best approximation of it."""

    def merge(self, given: Given) -> dict[str, Pair]:
        return {
            name: reduce_rank(stack(changes, given.weights), given.rank)
            for name, changes in given.layers.items()
        }
