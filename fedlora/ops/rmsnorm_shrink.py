"""Root-mean-square norm that also shrinks its output: [X | X A^T] in one buffer.

Zhang and Sennrich, "Root Mean Square Layer Normalization",
https://arxiv.org/abs/1910.07467, eq. 4. With W and s B side by side, one product of the buffer
is a whole LoRA linear: [X | S] [W | s B]^T = X W^T + s S B^T.

Shapes: M rows, k columns, r rank (the sum of ranks for several linears of one X).
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from fedlora.ops.registry import uses_triton

_LIBRARY = torch.library.Library("fedlora", "FRAGMENT")
_LIBRARY.define("rmsnorm_shrink(Tensor x, Tensor weight, Tensor a, float eps) -> Tensor")


def rmsnorm_shrink(x: Tensor, weight: Tensor, a: Tensor, eps: float) -> Tensor:
    """[X | X A^T] with X = weight * x / sqrt(mean(x^2) + eps), (..., k + r).

    The norm is taken in float32 or wider and rounded to the number format of x before it meets
    the weight, as in the Llama of transformers. There is no second derivative.

    Args:
        x: (..., k).
        weight: (k,), frozen, of the number format of x.
        a: (r, k), of any; a copy in that of x is computed with.
        eps: see above.
    """
    assert not weight.requires_grad, "the norm's weight has a gradient, not made here"
    made: Tensor = _RmsnormShrink.apply(x.flatten(0, -2), weight, a.to(x.dtype), eps)
    return made.view(*x.shape[:-1], made.shape[-1])


class _RmsnormShrink(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, a: Tensor, eps: float) -> Tensor:
        made: Tensor = torch.ops.fedlora.rmsnorm_shrink(x, weight, a, eps)
        ctx.save_for_backward(x, weight, a, made if ctx.needs_input_grad[2] else None)
        ctx.eps = eps
        return made

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, weight, a, made = ctx.saved_tensors
        width = x.shape[1]
        ds = grad[:, width:]
        da = ds.T @ made[:, :width] if ctx.needs_input_grad[2] else None
        if not ctx.needs_input_grad[0]:
            return None, None, da, None
        normed = torch.addmm(grad[:, :width], ds, a)
        wide = _widened(x)
        size = _inverse_size(wide, ctx.eps)
        unit = wide * size
        slope = _widened(normed) * weight
        dx = size * (slope - unit * (slope * unit).mean(1, keepdim=True))
        return dx.to(x.dtype), None, da, None


def _widened(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _inverse_size(wide: Tensor, eps: float) -> Tensor:
    return (wide.square().mean(1, keepdim=True) + eps).rsqrt()


def _rmsnorm_shrink(x: Tensor, weight: Tensor, a: Tensor, eps: float) -> Tensor:
    if uses_triton(x) and x.dtype != torch.float64:
        from fedlora.ops.kernels.rmsnorm_shrink import rmsnorm_shrink as kernel

        return kernel(x, weight, a, eps)
    wide = _widened(x)
    normed = (wide * _inverse_size(wide, eps)).to(x.dtype) * weight
    return torch.cat([normed, normed @ a.T], 1)


def _fake(x: Tensor, weight: Tensor, a: Tensor, eps: float) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[1] + a.shape[0])


_LIBRARY.impl("rmsnorm_shrink", _rmsnorm_shrink, "CompositeExplicitAutograd")
torch.library.register_fake("fedlora::rmsnorm_shrink", _fake, lib=_LIBRARY)
