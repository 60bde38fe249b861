"""FedEx-LoRA: the mean of the factors, and beside it what that leaves out of the mean change.

Singhal et al., "FedEx-LoRA: Exact Aggregation for Federated and Efficient Fine-Tuning of
Foundation Models", https://arxiv.org/abs/2410.09432, section 4.

In rounds the residual is folded into the base weight. In one shot there is no base to fold
it into: the result is the mean factors with the residual's stacked beside them, so without a
rank it is the exact mean, as `flora` gives it, in another division into slots and without
those that the residual does not need. Adapters of unequal rank are padded with zero slots.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from fedlora.errors import ConfigError
from fedlora.linalg import Pair, recompress, stack
from fedlora.merging.base import Given, Merger, reduce_rank


@dataclass(frozen=True)
class FedExLora(Merger):
    """[mean B | residual] [mean A ; residual]; a rank K leaves K - r slots to the residual.

    That is the paper's truncated residual: the best for mean factors that stay as they are, so
    not the best of rank K, which `flexlora` gives.
    """

    # of unequal ranks, the residual can have rank sum_i r_i + r
    full_rank: ClassVar[bool] = True

    def merge(self, given: Given) -> dict[str, Pair]:
        return {
            name: self._layer(name, changes, given.weights, given.rank)
            for name, changes in given.layers.items()
        }

    def _layer(
        self, name: str, changes: tuple[Pair, ...], weights: tuple[float, ...], rank: int | None
    ) -> Pair:
        own = max(right.shape[0] for _, right in changes)
        if rank is not None and rank < own:
            raise ConfigError(
                f"--rank {rank} is too small for fedex-lora: the averaged factors of layer {name} "
                f"have rank {own}; give at least that, or choose flexlora"
            )
        lefts = [_pad(left, 1, own - left.shape[1]) for left, _ in changes]
        rights = [_pad(right, 0, own - right.shape[0]) for _, right in changes]
        left = sum((w * b for w, b in zip(weights, lefts, strict=True)), torch.zeros(()))
        right = sum((w * a for w, a in zip(weights, rights, strict=True)), torch.zeros(()))
        # centred: the difference of two large products would lose digits
        centred = [(b - left, a - right) for b, a in zip(lefts, rights, strict=True)]
        residual = recompress(*stack(centred, weights))
        residual = reduce_rank(residual, None if rank is None else rank - own)
        return torch.cat([left, residual[0]], 1), torch.cat([right, residual[1]], 0)


def _pad(factor: torch.Tensor, dim: int, slots: int) -> torch.Tensor:
    shape = list(factor.shape)
    shape[dim] = slots
    return torch.cat([factor, factor.new_zeros(shape)], dim)
