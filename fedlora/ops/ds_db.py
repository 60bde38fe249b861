"""Both gradients on the far side of a low-rank product: dS = s dY B and dB = s dY^T S."""

import torch
from torch import Tensor

from fedlora.ops.registry import uses_triton

_LIBRARY = torch.library.Library("fedlora", "FRAGMENT")
_LIBRARY.define("ds_db(Tensor dy, Tensor b, Tensor s, float scale, Tensor(ds!) ds) -> Tensor")


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
        db: Tensor = torch.ops.fedlora.ds_db(dy, b, s, scale, ds)
        return db
    if ds is not None:
        ds.addmm_(dy, b, beta=0, alpha=scale)
    if s is None:
        return None
    return torch.empty_like(b).addmm_(dy.T, s, beta=0, alpha=scale)


@torch.library.impl(_LIBRARY, "ds_db", "CompositeExplicitAutograd")
def _(dy: Tensor, b: Tensor, s: Tensor, scale: float, ds: Tensor) -> Tensor:
    from fedlora.ops.kernels.ds_db import ds_db_ as kernel

    return kernel(dy, b, s, scale, ds)


@torch.library.register_fake("fedlora::ds_db", lib=_LIBRARY)
def _(dy: Tensor, b: Tensor, s: Tensor, scale: float, ds: Tensor) -> Tensor:
    return torch.empty_like(b)
