"""Task arithmetic: the changes are added up.

Ilharco et al., "Editing Models with Task Arithmetic", https://arxiv.org/abs/2212.04089,
section 2: W0 + lambda sum_i dW_i. Here the weights sum to 1, so that `scaling` = 1 is the
mean, and `scaling` = n the plain sum of n adapters.
"""

from dataclasses import dataclass

from fedlora.linalg import Pair, stack
from fedlora.merging.base import Given, Merger, check_finite, reduce_rank


@dataclass(frozen=True)
class TaskArithmetic(Merger):
    """Scaling * sum_i w_i dW_i, exact as a stack of rank sum_i r_i.

    Attributes:
        scaling: the paper's lambda.
    """

    scaling: float = 1.0

    def __post_init__(self) -> None:
        check_finite("scaling", self.scaling)

    def merge(self, given: Given) -> dict[str, Pair]:
        factors = [self.scaling * w for w in given.weights]
        return {
            name: reduce_rank(stack(changes, factors), given.rank)
            for name, changes in given.layers.items()
        }
