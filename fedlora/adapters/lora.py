"""LoRA and rank-stabilised LoRA: weight change s B A.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models",
https://arxiv.org/abs/2106.09685, section 4.1 (s = alpha / r).
Kalajdzievski, "A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA",
https://arxiv.org/abs/2312.03732, section 3 (s = alpha / sqrt(r)).
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fedlora.adapter import LayerSpec
from fedlora.adapters.base import AdapterLayer, Basis, Method
from fedlora.adapters.leaves import is_tapped, leaf_weight, linear_leaf
from fedlora.adapters.stacked_leaves import StackedLinear
from fedlora.ops.lora_linear import lora_linears
from fedlora.ops.multi_lora import multi_loras
from fedlora.seeds import generator


def kaiming_uniform(rows: int, columns: int, seed: int, *stream: str) -> Tensor:
    """U(-1/sqrt(columns), 1/sqrt(columns)) of shape (rows, columns), float32 on the CPU."""
    draws = torch.rand(rows, columns, generator=generator(seed, *stream), dtype=torch.float32)
    return (2.0 * draws - 1.0) / math.sqrt(columns)


class Lora(Method):
    """Factors A (r, k), random, and B (d, r), zero.

    Args:
        name: name of the method.
        stabilised: s = alpha / sqrt(r) instead of alpha / r.
    """

    bilinear_factors = ("B", "A")
    product = True

    def __init__(self, name: str, *, stabilised: bool = False) -> None:
        self.name = name
        self.stabilised = stabilised

    def scale(self, rank: int, alpha: float) -> float:
        return alpha / math.sqrt(rank) if self.stabilised else alpha / rank

    def factor_shapes(self, layer: LayerSpec) -> dict[str, tuple[int, ...]]:
        return {"A": (layer.rank, layer.inp), "B": (layer.out, layer.rank)}

    def attach(
        self,
        base: nn.Module,
        layer: LayerSpec,
        basis: Basis,
        *,
        seed: int,
        dropout: float,
        options: Mapping[str, Any],
    ) -> "LoraLayer":
        new = self.fresh(layer, seed)
        return LoraLayer(base, layer, self, new["A"], new["B"], dropout)

    def fresh(self, layer: LayerSpec, seed: int) -> dict[str, Tensor]:
        a = kaiming_uniform(layer.rank, layer.inp, seed, "init", layer.name, "A")
        return {"A": a, "B": torch.zeros(layer.out, layer.rank)}

    def lowrank(
        self, layer: LayerSpec, factors: Mapping[str, Tensor], basis: Basis
    ) -> tuple[Tensor, Tensor]:
        return layer.scale * factors["B"], factors["A"]

    def resize(self, factor: str, tensor: Tensor, old: LayerSpec, new: LayerSpec) -> Tensor:
        return resize_slots(tensor, 0 if factor == "A" else 1, new.rank)


_LINEAR = (nn.Linear, Conv1D, StackedLinear)


class Together(Protocol):
    """Layers of one input that are computed by one op, see `fedlora.adapters.siblings`."""

    def output(self, layer: "LoraLayer", x: Tensor) -> Tensor:
        """That of one of them."""
        ...


class LoraLayer(AdapterLayer):
    """y = base(x) + s B A dropout(x).

    Attributes:
        together: the layers that have the same input, this one among them; None if there are none.
    """

    def __init__(
        self,
        base: nn.Module,
        layer: LayerSpec,
        method: Method,
        a: Tensor,
        b: Tensor,
        dropout: float,
    ) -> None:
        super().__init__(base, layer, method, {}, dropout)
        self.A = linear_leaf(a.to(self.weight.device, self.factor_dtype))  # (r, k)
        self.B = linear_leaf(b.to(self.weight.device, self.factor_dtype))  # (d, r)
        self.together: Together | None = None

    def factors(self) -> dict[str, nn.Parameter]:
        return {"A": leaf_weight(self.A), "B": leaf_weight(self.B)}

    def adapted(self, x: Tensor) -> Tensor:
        if self.plain():
            if self.together is None or torch.compiler.is_compiling():
                return lora_outputs((self,), x)[0]
            return self.together.output(self, x)
        y: Tensor = self.base(x)
        h = self.A(self.dropout(x).to(self.factor_dtype))  # (..., r)
        change: Tensor = self.layer.scale * self.B(h)
        return y + change.to(y.dtype)

    def takes_any_shape(self) -> bool:
        return self.plain()

    def plain(self) -> bool:
        """Nothing happens in this layer but two linears, so that one op can be both."""
        return (
            not is_tapped(self.dropout)
            and self._original is None
            and all(
                type(module) in _LINEAR and not is_tapped(module)
                for module in (self.base, self.A, self.B)
            )
        )


def lora_outputs(
    layers: Sequence[LoraLayer], x: Tensor, *, biased: bool = True
) -> tuple[Tensor, ...]:
    """What `plain` layers make of the same x (..., k), (..., d_i) each, by one op."""
    weights = [layer.weight for layer in layers]
    biases = [layer.bias if biased else None for layer in layers]
    a_s = [layer.A.weight for layer in layers]
    b_s = [layer.B.weight for layer in layers]
    scales = [layer.layer.scale for layer in layers]
    dropout = layers[0].dropout.of(x)
    clients = max(math.prod(factor.shape[:-2]) for factor in (*a_s, *b_s))
    if all(factor.dim() == 2 for factor in (*a_s, *b_s)):
        return lora_linears(x, weights, biases, a_s, b_s, scales, dropout)
    # a factor that does not differ between clients is held once
    ys = multi_loras(
        x.reshape(clients, -1, x.shape[-1]),
        weights,
        biases,
        [a.expand(clients, *a.shape[-2:]) for a in a_s],
        [b.expand(clients, *b.shape[-2:]) for b in b_s],
        scales,
        dropout=dropout,
    )
    return tuple(y.view(*x.shape[:-1], y.shape[-1]) for y in ys)


def resize_slots(tensor: Tensor, dim: int, rank: int) -> Tensor:
    """The leading `rank` slots of `dim`; missing slots are zero, so the product is unchanged."""
    have = tensor.shape[dim]
    if have >= rank:
        return tensor.narrow(dim, 0, rank).clone()
    shape = list(tensor.shape)
    shape[dim] = rank - have
    return torch.cat([tensor, tensor.new_zeros(shape)], dim)
