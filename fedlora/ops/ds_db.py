"""Both gradients on the far side of a low-rank product: dS = s dY B and dB = s dY^T S."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fedlora.ops import row_groups
from fedlora.ops.registry import uses_triton

_LIBRARY = torch.library.Library("fedlora", "FRAGMENT")
_LIBRARY.define(
    "ds_db(Tensor dy, Tensor b, Tensor s, SymInt[] sizes, float scale, Tensor(ds!) ds) -> Tensor"
)


def ds_db(
    dy: Tensor, b: Tensor, s: Tensor | None, scale: float, ds: Tensor | None
) -> Tensor | None:
    """Writes scale dY B to `ds`, and gives scale dY^T S; below autograd.

    On a GPU, if both are wanted, they are made in one pass over dY.

    Args:
        dy: (M, d).
        b: (d, r).
        s: (M, r), or None if dB is not wanted.
        scale: of both.
        ds: (M, r), any strides, overwritten; or None if dS is not wanted.

    Returns:
        dB (d, r) in the number format of `b`, or None.
    """
    if ds is not None and s is not None and uses_triton(dy) and dy.dtype != torch.float64:
        return grouped_ds_db(dy, b[None], s, [dy.shape[0]], scale, ds)[0]
    if ds is not None:
        ds.addmm_(dy, b, beta=0, alpha=scale)
    if s is None:
        return None
    return torch.empty_like(b).addmm_(dy.T, s, beta=0, alpha=scale)


def grouped_ds_db(
    dy: Tensor, b: Tensor, s: Tensor, sizes: Sequence[int], scale: float, ds: Tensor
) -> Tensor:
    """`ds_db` of groups of rows, each with a B of its own: b and the result are (K, d, r)."""
    db: Tensor = torch.ops.fedlora.ds_db(dy, b, s, sizes, scale, ds)
    return db


def _ds_db(
    dy: Tensor, b: Tensor, s: Tensor, sizes: Sequence[int], scale: float, ds: Tensor
) -> Tensor:
    if uses_triton(dy) and dy.dtype != torch.float64:
        from fedlora.ops.kernels.ds_db import ds_db as kernel

        return kernel(dy, b, s, sizes, scale, ds)
    way = row_groups.choose(b.shape[2], b.shape[1:2], sizes, dy.device, dy.dtype)
    ds.copy_(row_groups.shrink(dy, b.mT, sizes, None, way, scale))
    return row_groups.factor_grads(dy, s, sizes, None, way, scale)


def _fake(
    dy: Tensor, b: Tensor, s: Tensor, sizes: Sequence[int], scale: float, ds: Tensor
) -> Tensor:
    return b.new_empty(b.shape)


_LIBRARY.impl("ds_db", _ds_db, "CompositeExplicitAutograd")
torch.library.register_fake("fedlora::ds_db", _fake, lib=_LIBRARY)
