"""Gradients of single examples with their norms, and the sum that is left after clipping.

For a linear leaf y = x W^T with gradient g of its output, an example's gradient is
sum_t g_t x_t^T: the product that its plain gradient needs as well, only not summed over the
examples. For factors of rank r it is cheaper than its norm by inner products of tokens
(Goodfellow, https://arxiv.org/abs/1510.01799; "ghost" norms) as soon as there are more than r
tokens.

These run in the backward pass, below autograd, and so have no derivatives of their own.
"""

import torch
from torch import Tensor

from fedlora.ops.registry import uses_triton


def sample_grads(x: Tensor, g: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """Each example's gradient of a linear leaf's weight, and its squared L2 norm.

    The norm is that of the gradient as it is stored, after rounding to `dtype`, so that it
    bounds what is summed later.

    Args:
        x: inputs (N, T, i).
        g: gradients of the outputs (N, T, o).
        dtype: how gradients are stored; None is float32, or wider if an argument is.

    Returns:
        gradients (N, o, i), and squared norms (N,) in float32 or wider.
    """
    wide = torch.promote_types(torch.promote_types(x.dtype, g.dtype), torch.float32)
    dtype = dtype or wide
    if uses_triton(x) and wide == torch.float32:
        from fedlora.ops.kernels.sample_grads import sample_grads as kernel

        return kernel(x, g, dtype)
    grads = (g.to(wide).mT @ x.to(wide)).to(dtype)
    return grads, squared_norms(grads)


def squared_norms(grads: Tensor) -> Tensor:
    """Squared L2 norm of every example's gradient (N, *shape), (N,) in float32 or wider."""
    wide = grads.to(torch.promote_types(grads.dtype, torch.float32))
    return wide.flatten(1).square().sum(1)


def weighted_sum(grads: Tensor, weights: Tensor) -> Tensor:
    """sum_n w_n g_n in the precision of the weights, (*shape).

    Args:
        grads: (N, *shape). An example of weight 0 may hold anything, also NaN.
        weights: (N,), float32 or float64.
    """
    if uses_triton(grads) and weights.dtype == torch.float32:
        from fedlora.ops.kernels.weighted_sum import weighted_sum as kernel

        return kernel(grads, weights)
    taken = weights != 0
    if not bool(taken.all()):
        grads, weights = grads[taken], weights[taken]
    total: Tensor = torch.tensordot(weights, grads.to(weights.dtype), 1)
    return total
