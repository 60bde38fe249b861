"""DoRA: a trained magnitude per output row, and LoRA on the direction.

Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", https://arxiv.org/abs/2402.09353,
section 4.1, W' = m V / |V| with V = W0 + s B A, and 4.3, where |V| is held constant in the
backward pass. The norm runs over the inputs of each output row.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedlora.adapter import LayerSpec
from fedlora.adapters.base import Basis, Method
from fedlora.adapters.leaves import DiagScale, leaf_weight
from fedlora.adapters.lora import LoraLayer, kaiming_uniform, lora_outputs, resize_slots

# keeps a row of zeros (padding) at zero instead of 0 / 0
_SMALLEST_NORM = 1e-12


class Dora(Method):
    """Factors A (r, k), random, B (d, r), zero, and m (d,), the row norms of W0."""

    name = "dora"
    additive = False

    def scale(self, rank: int, alpha: float) -> float:
        return alpha / rank

    def factor_shapes(self, layer: LayerSpec) -> dict[str, tuple[int, ...]]:
        return {"A": (layer.rank, layer.inp), "B": (layer.out, layer.rank), "m": (layer.out,)}

    def attach(
        self,
        base: nn.Module,
        layer: LayerSpec,
        basis: Basis,
        *,
        seed: int,
        dropout: float,
        options: Mapping[str, Any],
    ) -> "DoraLayer":
        a = kaiming_uniform(layer.rank, layer.inp, seed, "init", layer.name, "A")
        return DoraLayer(base, layer, self, a, torch.zeros(layer.out, layer.rank), dropout)

    def resize(self, factor: str, tensor: Tensor, old: LayerSpec, new: LayerSpec) -> Tensor:
        if factor == "m":
            return tensor
        return resize_slots(tensor, 0 if factor == "A" else 1, new.rank)


class DoraLayer(LoraLayer):
    """y = m / |V| * (x W0^T + s B A dropout(x)) + bias."""

    def __init__(
        self,
        base: nn.Module,
        layer: LayerSpec,
        method: Method,
        a: Tensor,
        b: Tensor,
        dropout: float,
    ) -> None:
        super().__init__(base, layer, method, a, b, dropout)
        self.m = DiagScale(self.norms())  # (d,)

    def factors(self) -> dict[str, nn.Parameter]:
        return {**super().factors(), "m": leaf_weight(self.m)}

    def norms(self) -> Tensor:
        """The row norms of V (d,), without gradient; (K, d) for stacked factors."""
        return row_norms(self.weight, self.layer.scale * self.B.weight, self.A.weight)

    def adapted(self, x: Tensor) -> Tensor:
        direction = self._direction(x)
        kind = direction.dtype
        norms = self.norms()
        if norms.dim() == 2:  # (K, d): rows are ordered by client
            direction = (direction.reshape(len(norms), -1, len(norms[0])) / norms[:, None]).view(
                direction.shape
            )
        else:
            direction = direction / norms
        scaled: Tensor = self.m(direction)
        y = scaled.to(kind)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def _direction(self, x: Tensor) -> Tensor:
        """Gives x W0^T + s B A dropout(x)."""
        if self.plain():
            return lora_outputs((self,), x, biased=False)[0]
        y = F.linear(x, self.weight)
        h = self.A(self.dropout(x).to(self.factor_dtype))  # (..., r)
        change: Tensor = self.layer.scale * self.B(h)
        return y + change.to(y.dtype)

    def takes_any_shape(self) -> bool:
        return False

    def delta_weight(self) -> Tensor:
        weight = self.weight.to(self.factor_dtype)
        v = weight + self.layer.scale * self.B.weight @ self.A.weight
        return (self.m.weight / self.norms())[:, None] * v - weight


@torch.no_grad()
def row_norms(weight: Tensor, b: Tensor, a: Tensor) -> Tensor:
    """Row norms (d,) of W + B A, in the dtype of the factors.

    |w_i + b_i A|^2 = |w_i|^2 + 2 (W A^T)_i . b_i + b_i A A^T b_i, so that B A (d, k) is never
    formed.

    Args:
        weight: W (d, k).
        b: B (d, r), scale included.
        a: A (r, k); both may have a leading dimension of clients, as the result then has.
    """
    with torch.autocast(weight.device.type, enabled=False):
        w = weight.to(a.dtype)
        cross = 2.0 * w @ a.mT + b @ (a @ a.mT)  # (d, r)
        squared = w.square().sum(1) + (cross * b).sum(-1)
        return squared.clamp_min(_SMALLEST_NORM**2).sqrt()
