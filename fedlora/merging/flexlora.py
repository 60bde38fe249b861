"""FlexLoRA: the best low-rank approximation of the mean change.

Bai et al., "Federated Fine-tuning of Large Language Models under Heterogeneous Tasks and
Client Resources", https://arxiv.org/abs/2402.11505, section 3.2.
"""

from dataclasses import dataclass

from fedlora.linalg import Pair, stack
from fedlora.merging.base import Given, Merger, reduce_rank


@dataclass(frozen=True)
class FlexLora(Merger):
    """The SVD of sum_i w_i dW_i, cut to the rank; by default the largest rank of an adapter."""

    def merge(self, given: Given) -> dict[str, Pair]:
        return {
            name: reduce_rank(
                stack(changes, given.weights),
                given.rank or max(right.shape[0] for _, right in changes),
            )
            for name, changes in given.layers.items()
        }
