"""MiSS: one trained shard, repeated along the input dimension.

Kang & Yin, "MiSS: Revisiting the Trade-off in LoRA with an Efficient Shard-Sharing
Structure", https://arxiv.org/abs/2409.15371 (from version 4 on; the first versions of that
paper describe Bone, see `fedlora.adapters.bone`). The "mini" form, option `r2`, repeats the
shard along the output dimension too.

Weight change D T, with T (r, k) = 1 where column mod r = row; the last shard is cut off when
r does not divide k.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fedlora.adapter import LayerSpec
from fedlora.adapters.base import AdapterLayer, Basis, Method
from fedlora.adapters.leaves import leaf_weight, linear_leaf, pad_last
from fedlora.errors import AdapterError


class Miss(Method):
    """Factor D (d, r), zero; (r2, r) in the mini form. No scale."""

    name = "miss"
    affine = True
    uses_alpha = False
    options: ClassVar[Mapping[str, Any]] = {"r2": 0}

    def misfit(self, d: int, k: int, rank: int, options: Mapping[str, Any]) -> str:
        tile = options["r2"]
        if tile < 0 or (tile and d % tile):
            return f"adapter.options.r2 = {tile} does not divide {d}"
        return f"the rank is larger than {k}" if rank > k else ""

    def plan(
        self,
        shapes: Mapping[str, tuple[int, int]],
        rank: int,
        alpha: float,
        options: Mapping[str, Any],
    ) -> tuple[LayerSpec, ...]:
        layers = super().plan(shapes, rank, alpha, options)
        return tuple(dataclasses.replace(layer, tile=options["r2"]) for layer in layers)

    def factor_shapes(self, layer: LayerSpec) -> dict[str, tuple[int, ...]]:
        return {"D": (layer.tile or layer.out, layer.rank)}

    def attach(
        self,
        base: nn.Module,
        layer: LayerSpec,
        basis: Basis,
        *,
        seed: int,
        dropout: float,
        options: Mapping[str, Any],
    ) -> "MissLayer":
        return MissLayer(base, layer, self, {}, dropout)

    def lowrank(
        self, layer: LayerSpec, factors: Mapping[str, Tensor], basis: Basis
    ) -> tuple[Tensor, Tensor]:
        d = factors["D"]
        eye = torch.eye(layer.rank, dtype=d.dtype, device=d.device)
        repeats = -(-layer.inp // layer.rank)
        return d.repeat(layer.out // d.shape[0], 1), eye.repeat(1, repeats)[:, : layer.inp]

    def resize(self, factor: str, tensor: Tensor, old: LayerSpec, new: LayerSpec) -> Tensor:
        if new.rank % old.rank == 0:
            return tensor.repeat(1, new.rank // old.rank)
        if old.rank % new.rank == 0:
            return tensor.reshape(tensor.shape[0], -1, new.rank).mean(1)
        raise AdapterError(
            f"method 'miss' cannot change rank from {old.rank} to {new.rank}: one must be a "
            "multiple of the other; choose client ranks that divide the server's rank"
        )


class MissLayer(AdapterLayer):
    """y = base(x) + D h, where h sums the shards of length r of dropout(x)."""

    def __init__(
        self, base: nn.Module, layer: LayerSpec, method: Method, basis: Basis, dropout: float
    ) -> None:
        super().__init__(base, layer, method, basis, dropout)
        shape = method.factor_shapes(layer)["D"]
        self.D = linear_leaf(self.weight.new_zeros(shape, dtype=self.factor_dtype))

    def factors(self) -> dict[str, nn.Parameter]:
        return {"D": leaf_weight(self.D)}

    def adapted(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        rank = self.layer.rank
        padded = pad_last(self.dropout(x).to(self.factor_dtype), rank)
        shards = padded.reshape(*x.shape[:-1], padded.shape[-1] // rank, rank)
        change: Tensor = self.D(shards.sum(-2))  # (..., d) or (..., r2)
        if self.layer.tile:
            change = change.repeat(*[1] * (x.dim() - 1), self.layer.out // self.layer.tile)
        return y + change.to(y.dtype)
