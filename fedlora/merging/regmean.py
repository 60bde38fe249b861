"""RegMean: the weights whose outputs are closest to every adapter's on its own inputs.

Jin et al., "Dataless Knowledge Fusion by Merging Weights of Language Models",
https://arxiv.org/abs/2212.09849, section 3: the minimiser of sum_i w_i |x (W - W_i)^T|^2
over the inputs x of model i is W = (sum_i w_i W_i G_i) (sum_i w_i G_i)^-1, with G_i the mean
of x x^T, whose off-diagonal entries are shrunk first.

G_i is a mean over tokens, so that a longer file has no larger say. It is a statistic of the
data, and can reveal them; it is not written to the result.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedlora.linalg import Pair
from fedlora.merging.base import Given, Merger, check_range, reduce_rank


@dataclass(frozen=True)
class RegMean(Merger):
    """Exact in factors of rank sum_i r_i.

    Attributes:
        off_diagonal: factor of the off-diagonal entries of the Grams, the paper's alpha.
        max_length: texts are cut to so many tokens.
    """

    needs_data: ClassVar[bool] = True

    off_diagonal: float = 0.95
    max_length: int = 512

    def __post_init__(self) -> None:
        inside = 0.0 <= self.off_diagonal <= 1.0
        check_range("off_diagonal", self.off_diagonal, inside, "between 0 and 1")
        check_range("max_length", self.max_length, self.max_length >= 1, "from 1 up")

    def merge(self, given: Given) -> dict[str, Pair]:
        merged = {}
        for name, changes in given.layers.items():
            grams = [self._shrunk(gram) for gram in given.grams[name]]
            merged[name] = reduce_rank(regression_mean(changes, given.weights, grams), given.rank)
        return merged

    def _shrunk(self, gram: Tensor) -> Tensor:
        diagonal = torch.diag(gram.diagonal())
        return self.off_diagonal * gram + (1.0 - self.off_diagonal) * diagonal


def regression_mean(
    changes: tuple[Pair, ...], weights: tuple[float, ...], grams: list[Tensor]
) -> Pair:
    """The minimiser dW of sum_i w_i tr((dW - dW_i) G_i (dW - dW_i)^T), as (L (d, R), Q (R, k)).

    Where the Grams leave directions free, the minimiser nearest to the mean: with G the mean
    Gram, dW = sum_i w_i dW_i (I + (G_i - G) G^+). In this form equal Grams give the mean to
    the last digit, however badly conditioned they are.

    Args:
        changes: per adapter (d, r_i), (r_i, k).
        weights: positive, of sum 1.
        grams: per adapter (k, k), positive semi-definite.
    """
    mean = torch.stack([w * gram for w, gram in zip(weights, grams, strict=True)]).sum(0)
    inverse = torch.linalg.pinv(mean, hermitian=True)
    rights = [
        w * (right + (right @ (gram - mean)) @ inverse)
        for w, (_, right), gram in zip(weights, changes, grams, strict=True)
    ]
    return torch.cat([left for left, _ in changes], 1), torch.cat(rights, 0)
