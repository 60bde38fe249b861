"""S = dropout(x) A^T without the mask or the masked input in memory, in either direction."""

from typing import Any

from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from fedlora.ops import row_ops
from fedlora.ops.autocast import compute_dtype
from fedlora.ops.dropout_mask import Dropout


def dropout_shrink(x: Tensor, a: Tensor, dropout: Dropout) -> Tensor:
    """dropout(x) A^T, (..., r), in the number format of x, or autocast's if that is on.

    What is kept for backward is x, whatever the rate. There is no second derivative.

    Args:
        x: (..., k); rows are numbered through all leading dimensions.
        a: (r, k).
        dropout: with a key of shape ().
    """
    dtype = compute_dtype(x)
    s: Tensor = _DropoutShrink.apply(
        x.flatten(0, -2).to(dtype), a.to(dtype), dropout.key.reshape(1), dropout.rate
    )
    return s.view(*x.shape[:-1], a.shape[0])


class _DropoutShrink(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, keys: Tensor, rate: float) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, a, keys)
        sizes = [x.shape[0]]
        ctx.way = row_ops.way_of(x, a.shape[0], (a.shape[1],), sizes, masked=True)
        ctx.rate = rate
        return row_ops.shrink(x, a[None], sizes, keys, rate, ctx.way)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, ds: Tensor) -> tuple[Any, ...]:
        x, a, keys = ctx.saved_tensors
        needs_x, needs_a = ctx.needs_input_grad[:2]
        masking = ([ds.shape[0]], keys, ctx.rate, ctx.way)
        dx = da = None
        if needs_a:
            da = row_ops.factor_grads(ds, x, *masking)[0]
        if needs_x:
            dx = ds.new_zeros(ds.shape[0], a.shape[1])
            row_ops.expand_(dx, ds, a.T[None], *masking)
        return dx, da, None, None
