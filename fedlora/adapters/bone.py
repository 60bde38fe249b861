"""Bone: W0 in b x b blocks, each moved by an affine map that a strip of blocks shares.

Kang & Yin, "Bone: Block-Affine Adaptation of Large Language Models",
https://arxiv.org/abs/2409.15371, versions 1 to 3: W_ij -> W_ij (I + B) + B, where B belongs
to the output strip i (Bone-col) or to the input strip j (Bone-row). Later versions of the
paper give the name to another structure, see `fedlora.adapters.miss`.

Differs from the paper: shapes that b does not divide are zero-padded to whole blocks and the
change is cut to (d, k), unless option `strict_divisible` is set.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedlora.adapter import LayerSpec
from fedlora.adapters.base import AdapterLayer, Basis, Method
from fedlora.adapters.leaves import (
    BlockDiagLinear,
    BoneColDelta,
    bone_col_delta,
    leaf_weight,
    pad_last,
    padded_blocks,
)
from fedlora.errors import AdapterError

# beyond this condition number of I + B nothing of a float32 W0 is left to recover
_WORST_CONDITION = 1e6


class Bone(Method):
    """Factor B (ceil(d / b), b, b) or (ceil(k / b), b, b), zero; the rank is b. No scale.

    Args:
        name: name of the method.
        by_row: blocks of one input strip share B (Bone-row) instead of one output strip.
    """

    affine = True
    additive = False
    uses_alpha = False
    options: ClassVar[Mapping[str, Any]] = {"strict_divisible": False}

    def __init__(self, name: str, *, by_row: bool) -> None:
        self.name = name
        self.by_row = by_row

    def misfit(self, d: int, k: int, rank: int, options: Mapping[str, Any]) -> str:
        if options["strict_divisible"] and (d % rank or k % rank):
            return f"with adapter.options.strict_divisible, {rank} must divide both"
        return super().misfit(d, k, rank, options)

    def factor_shapes(self, layer: LayerSpec) -> dict[str, tuple[int, ...]]:
        b = layer.rank
        return {"B": (-(-(layer.inp if self.by_row else layer.out) // b), b, b)}

    def attach(
        self,
        base: nn.Module,
        layer: LayerSpec,
        basis: Basis,
        *,
        seed: int,
        dropout: float,
        options: Mapping[str, Any],
    ) -> AdapterLayer:
        kind = BoneRowLayer if self.by_row else BoneColLayer
        return kind(base, layer, self, {}, dropout)


class BoneColLayer(AdapterLayer):
    """y = base(x) + dropout(x) D^T, D_ij = W_ij B_i + B_i."""

    def __init__(
        self, base: nn.Module, layer: LayerSpec, method: Method, basis: Basis, dropout: float
    ) -> None:
        super().__init__(base, layer, method, basis, dropout)
        shape = method.factor_shapes(layer)["B"]
        self.B = BoneColDelta(self.weight.new_zeros(shape, dtype=self.factor_dtype))

    def factors(self) -> dict[str, nn.Parameter]:
        return {"B": leaf_weight(self.B)}

    def adapted(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        change: Tensor = self.B(self.weight, self.dropout(x))
        return y + change.to(y.dtype)

    def delta_weight(self) -> Tensor:
        return bone_col_delta(self.weight, self.B.weight)


class BoneRowLayer(AdapterLayer):
    """y = base(x + z) + z summed over blocks, for every output block; z_j = B_j dropout(x)_j."""

    def __init__(
        self, base: nn.Module, layer: LayerSpec, method: Method, basis: Basis, dropout: float
    ) -> None:
        super().__init__(base, layer, method, basis, dropout)
        shape = method.factor_shapes(layer)["B"]
        self.B = BlockDiagLinear(self.weight.new_zeros(shape, dtype=self.factor_dtype))

    def factors(self) -> dict[str, nn.Parameter]:
        return {"B": leaf_weight(self.B)}

    def adapted(self, x: Tensor) -> Tensor:
        d, k, b = self.layer.out, self.layer.inp, self.layer.rank
        z: Tensor = self.B(pad_last(self.dropout(x).to(self.factor_dtype), b))  # (..., ceil(k/b) b)
        if x.dtype == z.dtype == self.factor_dtype:
            y: Tensor = self.base(x + z[..., :k])
        else:
            # in bf16, x + z would lose a small z
            y = F.linear(z[..., :k].to(self.weight.dtype), self.weight).add(self.base(x))
        shared = z.reshape(*x.shape[:-1], -(-k // b), b).sum(-2)  # (..., b)
        tiled = shared.repeat(*[1] * (x.dim() - 1), -(-d // b))[..., :d]
        return y + tiled.to(y.dtype)

    def delta_weight(self) -> Tensor:
        return bone_row_delta(self.weight, self.B.weight)


def bone_row_delta(weight: Tensor, blocks: Tensor) -> Tensor:
    """W_ij B_j + B_j for every block, (d, k), in the dtype of `blocks`.

    Args:
        weight: W0 (d, k).
        blocks: B (ceil(k / b), b, b).
    """
    d, k = weight.shape
    w = padded_blocks(weight.to(blocks.dtype), blocks.shape[-1])  # (n, b, m, b)
    delta = torch.einsum("iajc,jce->iaje", w, blocks) + blocks.transpose(0, 1)
    return delta.flatten(2).flatten(0, 1)[:d, :k]


def recover_weight(merged: Tensor, blocks: Tensor, *, by_row: bool) -> Tensor:
    """W0 (d, k) from W0 + change, by W_ij = (W'_ij - B) (I + B)^-1.

    Args:
        merged: W' (d, k).
        blocks: B (n, b, b).
        by_row: B belongs to input strips.

    Raises:
        AdapterError: some I + B is singular, so that the merge lost W0.
    """
    d, k = merged.shape
    b = blocks.shape[-1]
    blocks = blocks.double()
    w = padded_blocks(merged.double(), b)  # (n, b, m, b)
    inside = (torch.arange(w.shape[2] * b, device=w.device) < k).view(-1, b)  # (m, b)
    shift = blocks.transpose(0, 1) if by_row else blocks.unsqueeze(2)
    eye = torch.eye(b, dtype=blocks.dtype, device=blocks.device)
    maps = blocks.unsqueeze(0) if by_row else blocks.unsqueeze(1)
    # a padded column of W0 is zero and takes no part in the map
    both = inside[:, :, None] & inside[:, None, :]
    maps = torch.where(both, maps, 0.0) + eye  # (n or 1, m, b, b)
    if float(torch.linalg.cond(maps).max()) > _WORST_CONDITION:
        raise AdapterError(
            "I + B of a Bone adapter is singular, so W0 cannot be computed from the merged "
            "weight; load the base model again instead"
        )
    shifted = torch.where(inside, w - shift, 0.0)
    found: Tensor = torch.linalg.solve(maps, shifted.transpose(1, 2), left=False)  # (n, m, b, b)
    return found.transpose(1, 2).flatten(2).flatten(0, 1)[:d, :k].to(merged.dtype)
