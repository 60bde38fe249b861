"""LoRA linears whose rows belong to several clients, each with factors of its own.

y_i = x_i W^T + bias + s_i (x_i A_i^T) B_i^T for the rows x_i of client i: the frozen product is
one for all rows, so that clients too small to fill a GPU fill it together. The idea of batching
adapters is that of Chen et al., "Punica: Multi-Tenant LoRA Serving",
https://arxiv.org/abs/2310.18547, section 3; here with gradients.

Linears of one input are taken together, as in `fedlora.ops.lora_linear`.

Shapes: M rows, K clients, k inputs, d_i outputs, r_i ranks, R their sum.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from fedlora.ops import row_ops
from fedlora.ops.autocast import compute_dtype
from fedlora.ops.dropout_mask import NO_DROPOUT, Dropout, Settings
from fedlora.ops.ds_db import grouped_ds_db


def multi_lora(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scale: float,
    sizes: Sequence[int] | None = None,
    dropout: Dropout | None = None,
    *,
    way: str | None = None,
) -> Tensor:
    """One LoRA linear of K clients; see `multi_loras`."""
    (y,) = multi_loras(x, (weight,), (bias,), (a,), (b,), (scale,), sizes, dropout, way=way)
    return y


def multi_loras(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    a_s: Sequence[Tensor],
    b_s: Sequence[Tensor],
    scales: Sequence[float],
    sizes: Sequence[int] | None = None,
    dropout: Dropout | None = None,
    *,
    way: str | None = None,
) -> tuple[Tensor, ...]:
    """LoRA linears of one input and of K clients, in the number format of x, or autocast's.

    What each client gets is what `lora_linears` gives it on its own rows: to rounding, as the
    order of sums in a product depends on its shape. Weights and biases are frozen. There is no
    second derivative.

    Args:
        x: (K, n, k), or (M, k) with `sizes`: the rows of client after client.
        weights: (d_i, k), of any strides.
        biases: (d_i,) or None, each.
        a_s, b_s: factors (K, r_i, k) and (K, d_i, r_i); of any number format, which is that of
            their gradients.
        scales: s_i.
        sizes: how many rows each client has, which may be none.
        dropout: of the input of all A_i alike; with a key for each client, (K,).
        way: how rows meet factors, see `row_groups.choose`; None chooses.

    Returns:
        (K, n, d_i), or (M, d_i) with `sizes`, each.
    """
    assert not any(w.requires_grad for w in weights), "a weight has a gradient, not made here"
    assert not any(b is not None and b.requires_grad for b in biases)
    counts = [x.shape[1]] * x.shape[0] if sizes is None else list(sizes)
    dtype = compute_dtype(x)
    rows = (x.flatten(0, 1) if sizes is None else x).to(dtype)
    assert all(len(counts) == len(factor) for factor in (*a_s, *b_s)), "one factor for a client"
    assert sizes is None or sum(counts) == len(x), f"{len(x)} rows for sizes {counts}"
    a = a_s[0] if len(a_s) == 1 else torch.cat(tuple(a_s), 1)  # (K, R, k)
    if way is None:
        widths = (a.shape[2], *(b.shape[1] for b in b_s))
        way = row_ops.way_of(rows, a.shape[1], widths, counts, masked=dropout is not None)
    made: tuple[Tensor, ...] = _MultiLoras.apply(
        rows,
        a.to(dtype),
        None if dropout is None else dropout.key,
        NO_DROPOUT if dropout is None else dropout.settings,
        counts,
        way,
        tuple(scales),
        *weights,
        *biases,
        *(b.to(dtype) for b in b_s),
    )
    return made if sizes is not None else tuple(y.view(*x.shape[:-1], y.shape[1]) for y in made)


class _MultiLoras(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        a: Tensor,
        keys: Tensor | None,
        settings: Settings,
        sizes: list[int],
        way: str,
        scales: tuple[float, ...],
        *tensors: Any,
    ) -> tuple[Tensor, ...]:
        n = len(scales)
        weights, biases, b_s = tensors[:n], tensors[n : 2 * n], tensors[2 * n :]
        dropout = row_ops.mask_for(keys, settings, None, sizes, a, way)
        s = row_ops.shrink(x, a, sizes, dropout, way)  # (M, R)
        ys = []
        parts = s.split([b.shape[2] for b in b_s], 1)
        for weight, bias, b, part, scale in zip(weights, biases, b_s, parts, scales, strict=True):
            w = weight.to(x.dtype).T
            y = x @ w if bias is None else torch.addmm(bias.to(x.dtype), x, w)
            row_ops.expand_(y, part, b, sizes, None, way, scale)
            ys.append(y)
        needs_a, needs_b = ctx.needs_input_grad[1], any(ctx.needs_input_grad[7 + 2 * n :])
        kept = row_ops.to_keep(dropout)
        ctx.save_for_backward(
            x if needs_a else None, s if needs_b else None, a, keys, kept, *weights, *b_s
        )
        ctx.settings, ctx.sizes, ctx.way, ctx.scales = settings, sizes, way, scales
        ctx.set_materialize_grads(False)
        return tuple(ys)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        n, sizes, way = len(ctx.scales), ctx.sizes, ctx.way
        x, s, a, keys, kept, *others = ctx.saved_tensors
        weights, b_s = others[:n], others[n:]
        needs_x, needs_a = ctx.needs_input_grad[:2]
        ds = a.new_empty(sum(sizes), a.shape[1])
        dx: Tensor | None = None
        dbs: list[Tensor | None] = []
        start = 0
        for i, (grad, weight, b, scale) in enumerate(
            zip(grads, weights, b_s, ctx.scales, strict=True)
        ):
            part = slice(start, start + b.shape[2])
            start = part.stop
            if grad is None:
                # an output that nothing was made of
                ds[:, part] = 0
                dbs.append(None)
                continue
            # grouped products take no gradient that is expanded from one number
            dy = grad.contiguous()
            needs_b = ctx.needs_input_grad[7 + 2 * n + i]
            if way == row_ops.TRITON and needs_b and (needs_x or needs_a):
                dbs.append(grouped_ds_db(dy, b, s[:, part], sizes, scale, ds[:, part]))
            else:
                db = None
                if needs_b:
                    db = row_ops.factor_grads(dy, s[:, part], sizes, None, way, scale)
                dbs.append(db)
                if needs_x or needs_a:
                    ds[:, part] = row_ops.shrink(dy, b.mT, sizes, None, way, scale)
            if needs_x:
                w = weight.to(dy.dtype)
                dx = dy @ w if dx is None else dx.addmm_(dy, w)
        dropout = row_ops.mask_for(keys, ctx.settings, kept, sizes, a, way)
        da = row_ops.factor_grads(ds, x, sizes, dropout, way) if needs_a else None
        if dx is not None:
            row_ops.expand_(dx, ds, a.mT, sizes, dropout, way)
        return (dx, da, *[None] * (5 + 2 * n), *dbs)
