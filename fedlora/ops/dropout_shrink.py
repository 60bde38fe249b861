"""S = dropout(x) A^T without the mask or the masked input in memory, in either direction."""

from typing import Any

from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from fedlora.ops import row_ops
from fedlora.ops.autocast import compute_dtype
from fedlora.ops.dropout_mask import Dropout, Settings


def dropout_shrink(x: Tensor, a: Tensor, dropout: Dropout) -> Tensor:
    """dropout(x) A^T, (..., r), in the number format of x, or autocast's if that is on.

    What a GPU keeps for backward is x, whatever the rate. There is no second derivative.

    Args:
        x: (..., k).
        a: (r, k).
        dropout: with a key of shape ().
    """
    dtype = compute_dtype(x)
    s: Tensor = _DropoutShrink.apply(
        x.flatten(0, -2).to(dtype), a.to(dtype), dropout.key.reshape(1), dropout.settings
    )
    return s.view(*x.shape[:-1], a.shape[0])


class _DropoutShrink(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, keys: Tensor, settings: Settings) -> Tensor:
        sizes = [x.shape[0]]
        ctx.way = row_ops.way_of(x, a.shape[0], (a.shape[1],), sizes, masked=True)
        ctx.settings = settings
        dropout = row_ops.mask_for(keys, settings, None, sizes, a, ctx.way)
        kept = row_ops.to_keep(dropout)
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, a, keys, kept)
        return row_ops.shrink(x, a[None], sizes, dropout, ctx.way)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, ds: Tensor) -> tuple[Any, ...]:
        x, a, keys, kept = ctx.saved_tensors
        needs_x, needs_a = ctx.needs_input_grad[:2]
        sizes = [ds.shape[0]]
        dropout = row_ops.mask_for(keys, ctx.settings, kept, sizes, a, ctx.way)
        dx = da = None
        if needs_a:
            da = row_ops.factor_grads(ds, x, sizes, dropout, ctx.way)[0]
        if needs_x:
            dx = ds.new_zeros(ds.shape[0], a.shape[1])
            row_ops.expand_(dx, ds, a.T[None], sizes, dropout, ctx.way)
        return dx, da, None, None
