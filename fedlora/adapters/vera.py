"""VeRA: trained vectors around one frozen random pair, shared by all layers.

Kopiczko, Blankevoort & Asano, "VeRA: Vector-based Random Matrix Adaptation",
https://arxiv.org/abs/2310.11454, section 3.1: weight change diag(b) B diag(v) A (v is the
paper's d), and 3.3: b = 0, v = d_initial. The paper leaves the shared shapes open when layers
differ; here A and B have the largest shape and each layer takes the leading slice.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from fedlora.adapter import LayerSpec
from fedlora.adapters.base import AdapterLayer, Basis, Method
from fedlora.adapters.leaves import DiagScale, leaf_weight
from fedlora.adapters.lora import kaiming_uniform, resize_slots


class Vera(Method):
    """Factors b (d,), zero, and v (r,), constant; basis shared.A (r, max k), shared.B (max d, r).

    The basis depends on the set of layers and on the full rank. A client that holds fewer
    slots must therefore be given the basis, not make its own.
    """

    name = "vera"
    bilinear_factors = ("b", "v")
    uses_alpha = False
    basis_provenance = "seed"
    options: ClassVar[Mapping[str, Any]] = {"d_initial": 0.1}

    def misfit(self, d: int, k: int, rank: int, options: Mapping[str, Any]) -> str:
        return ""

    def make_basis(
        self,
        layers: tuple[LayerSpec, ...],
        weight: Callable[[str], Tensor],
        seed: int,
        options: Mapping[str, Any],
    ) -> dict[str, Tensor]:
        rank = max(layer.rank for layer in layers)
        most_inp = max(layer.inp for layer in layers)
        most_out = max(layer.out for layer in layers)
        # bound sqrt(6 / columns) where kaiming_uniform has 1 / sqrt(columns)
        gain = math.sqrt(6.0)
        return {
            "shared.A": gain * kaiming_uniform(rank, most_inp, seed, "basis", "shared", "A"),
            "shared.B": gain * kaiming_uniform(most_out, rank, seed, "basis", "shared", "B"),
        }

    def factor_shapes(self, layer: LayerSpec) -> dict[str, tuple[int, ...]]:
        return {"b": (layer.out,), "v": (layer.rank,)}

    def attach(
        self,
        base: nn.Module,
        layer: LayerSpec,
        basis: Basis,
        *,
        seed: int,
        dropout: float,
        options: Mapping[str, Any],
    ) -> "VeraLayer":
        return VeraLayer(base, layer, self, basis, dropout, float(options["d_initial"]))

    def lowrank(
        self, layer: LayerSpec, factors: Mapping[str, Tensor], basis: Basis
    ) -> tuple[Tensor, Tensor]:
        b, v = factors["b"], factors["v"]
        shared_a, shared_b = slices(layer, basis)
        return b[:, None] * shared_b.to(b), v[:, None] * shared_a.to(v)

    def resize(self, factor: str, tensor: Tensor, old: LayerSpec, new: LayerSpec) -> Tensor:
        return tensor if factor == "b" else resize_slots(tensor, 0, new.rank)


class VeraLayer(AdapterLayer):
    """y = base(x) + b * B (v * A dropout(x))."""

    def __init__(
        self,
        base: nn.Module,
        layer: LayerSpec,
        method: Method,
        basis: Basis,
        dropout: float,
        d_initial: float,
    ) -> None:
        super().__init__(base, layer, method, basis, dropout)
        empty = self.weight.new_empty(0, dtype=self.factor_dtype)
        self.b = DiagScale(empty.new_zeros(layer.out))
        self.v = DiagScale(empty.new_full((layer.rank,), d_initial))

    def factors(self) -> dict[str, nn.Parameter]:
        return {"b": leaf_weight(self.b), "v": leaf_weight(self.v)}

    def adapted(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        shared_a, shared_b = slices(self.layer, self.basis)
        h = F.linear(self.dropout(x).to(self.factor_dtype), shared_a)  # (..., r)
        change: Tensor = self.b(F.linear(self.v(h), shared_b))
        return y + change.to(y.dtype)


def slices(layer: LayerSpec, basis: Basis) -> tuple[Tensor, Tensor]:
    """The layer's part of the shared pair: A (r, k), B (d, r)."""
    a, b = basis["shared.A"], basis["shared.B"]
    return a[: layer.rank, : layer.inp], b[: layer.out, : layer.rank]
