"""A LoRA linear whose rows belong to several clients, each with factors of its own.

y_i = x_i W^T + bias + s_i (x_i A_i^T) B_i^T for the rows x_i of client i: the frozen product is
one for all rows, so that clients too small to fill a GPU fill it together. The idea of batching
adapters is that of Chen et al., "Punica: Multi-Tenant LoRA Serving",
https://arxiv.org/abs/2310.18547, section 3; here with gradients.

Shapes: M rows, K clients, k inputs, d outputs, r rank.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from fedlora.ops import row_ops
from fedlora.ops.autocast import compute_dtype
from fedlora.ops.dropout_mask import Dropout
from fedlora.ops.ds_db import grouped_ds_db


def multi_lora(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scales: Tensor,
    sizes: Sequence[int] | None = None,
    dropout: Dropout | None = None,
    *,
    way: str | None = None,
) -> Tensor:
    """LoRA linear of K clients at once, in the number format of x, or autocast's if that is on.

    What each client gets is what `lora_linear` gives it on its own rows: to rounding, as the
    order of sums in a product depends on its shape. Weight and bias are frozen. There is no
    second derivative.

    Args:
        x: (K, n, k), or (M, k) with `sizes`: the rows of client after client.
        weight: (d, k), of any strides.
        bias: (d,) or None.
        a, b: factors (K, r, k) and (K, d, r); of any number format, which is that of their
            gradients.
        scales: (K,).
        sizes: how many rows each client has, which may be none.
        dropout: with a key for each client, (K,).
        way: how rows meet factors, see `row_groups.choose`; None chooses.

    Returns:
        (K, n, d), or (M, d) with `sizes`.
    """
    assert not weight.requires_grad, "the weight has a gradient, not made here"
    assert bias is None or not bias.requires_grad
    counts = [x.shape[1]] * x.shape[0] if sizes is None else list(sizes)
    dtype = compute_dtype(x)
    rows = (x.flatten(0, 1) if sizes is None else x).to(dtype)
    assert len(counts) == len(a) == len(b) == len(scales), "one size and one adapter for a client"
    assert sizes is None or sum(counts) == len(x), f"{len(x)} rows for sizes {counts}"
    if way is None:
        widths = (a.shape[2], b.shape[1])
        way = row_ops.way_of(rows, a.shape[1], widths, counts, masked=dropout is not None)
    y: Tensor = _MultiLora.apply(
        rows,
        a.to(dtype),
        # the scales ride on B, so that there is one number less for every row
        (b * scales[:, None, None]).to(dtype),
        weight,
        bias,
        counts,
        None if dropout is None else dropout.key,
        0.0 if dropout is None else dropout.rate,
        way,
    )
    return y if sizes is not None else y.view(*x.shape[:-1], y.shape[1])


class _MultiLora(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        a: Tensor,
        b: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        sizes: list[int],
        keys: Tensor | None,
        rate: float,
        way: str,
    ) -> Tensor:
        w = weight.to(x.dtype).T
        y = x @ w if bias is None else torch.addmm(bias.to(x.dtype), x, w)
        s = row_ops.shrink(x, a, sizes, keys, rate, way)
        row_ops.expand_(y, s, b, sizes, None, 0.0, way)
        needs_a, needs_b = ctx.needs_input_grad[1:3]
        ctx.save_for_backward(x if needs_a else None, s if needs_b else None, a, b, weight, keys)
        ctx.sizes, ctx.rate, ctx.way = sizes, rate, way
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        x, s, a, b, weight, keys = ctx.saved_tensors
        needs_x, needs_a, needs_b = ctx.needs_input_grad[:3]
        sizes, way = ctx.sizes, ctx.way
        # grouped products take no gradient that is expanded from one number
        dy = dy.contiguous()
        dx = da = db = None
        if way == row_ops.TRITON and needs_b and (needs_x or needs_a):
            ds = torch.empty_like(s)
            db = grouped_ds_db(dy, b, s, sizes, 1.0, ds)
        else:
            if needs_b:
                db = row_ops.factor_grads(dy, s, sizes, None, 0.0, way)
            if needs_x or needs_a:
                ds = row_ops.shrink(dy, b.mT, sizes, None, 0.0, way)
        if needs_a:
            da = row_ops.factor_grads(ds, x, sizes, keys, ctx.rate, way)
        if needs_x:
            dx = dy @ weight.to(dy.dtype)
            row_ops.expand_(dx, ds, a.mT, sizes, keys, ctx.rate, way)
        return dx, da, db, *[None] * 6
