"""LoRA linears, y_i = x W_i^T + bias_i + s_i (x A_i^T) B_i^T, for up to three of one input.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models",
https://arxiv.org/abs/2106.09685, section 4.1. Linears of one input are taken together: all A_i
are one product in each direction, the input is kept once, and its gradient is summed in place.

Shapes: M rows (all leading dimensions of x), k inputs, d_i outputs, r_i ranks, R their sum.
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
from fedlora.ops.ds_db import ds_db


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scale: float,
    dropout: Dropout | None = None,
) -> Tensor:
    """One LoRA linear; see `lora_linears`."""
    (y,) = lora_linears(x, (weight,), (bias,), a, (b,), (scale,), dropout)
    return y


def lora_linears(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    a_s: Sequence[Tensor] | Tensor,
    b_s: Sequence[Tensor],
    scales: Sequence[float],
    dropout: Dropout | None = None,
) -> tuple[Tensor, ...]:
    """LoRA linears of one input, in its number format, or autocast's if that is on.

    Factors may be of another format: copies are computed with, and gradients come in theirs.
    Weights and biases are frozen. There is no second derivative.

    Args:
        x: (..., k).
        weights: W_i (d_i, k), of any strides.
        biases: (d_i,) or None, each.
        a_s: A_i (r_i, k); or all of them below one another as one tensor (R, k), which spares
            a copy.
        b_s: B_i (d_i, r_i).
        scales: s_i.
        dropout: of the input of all A_i alike, so that their masks are one mask; its key is of
            shape ().

    Returns:
        y_i (..., d_i).
    """
    assert not any(w.requires_grad for w in weights), "a weight has a gradient, not made here"
    assert not any(b is not None and b.requires_grad for b in biases)
    dtype = compute_dtype(x)
    if not isinstance(a_s, Tensor):
        a_s = a_s[0] if len(a_s) == 1 else torch.cat(tuple(a_s))
    rows = x.flatten(0, -2) if x.dim() > 1 else x[None]
    # outputs of the function itself are no views, so that they may be changed in place
    made: tuple[Tensor, ...] = _LoraLinears.apply(
        rows.to(dtype),
        a_s.to(dtype),
        None if dropout is None else dropout.key.reshape(1),
        NO_DROPOUT if dropout is None else dropout.settings,
        tuple(scales),
        *weights,
        *biases,
        *(b.to(dtype) for b in b_s),
    )
    return tuple(y.view(*x.shape[:-1], y.shape[1]) for y in made)


class _LoraLinears(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        a: Tensor,
        keys: Tensor | None,
        settings: Settings,
        scales: tuple[float, ...],
        *tensors: Any,
    ) -> tuple[Tensor, ...]:
        n = len(scales)
        weights, biases, b_s = tensors[:n], tensors[n : 2 * n], tensors[2 * n :]
        sizes, way = _group(x, a)
        dropout = row_ops.mask_for(keys, settings, None, sizes, a, way)
        if dropout is None:
            s = x @ a.T  # (M, R)
        else:
            s = row_ops.shrink(x, a[None], sizes, dropout, way)
        ys = []
        parts = s.split([b.shape[1] for b in b_s], 1)
        for weight, bias, b, part, scale in zip(weights, biases, b_s, parts, scales, strict=True):
            w = weight.to(x.dtype).T
            y = x @ w if bias is None else torch.addmm(bias.to(x.dtype), x, w)
            ys.append(y.addmm_(part, b.T, alpha=scale))
        needs_a, needs_b = ctx.needs_input_grad[1], any(ctx.needs_input_grad[5 + 2 * n :])
        kept = row_ops.to_keep(dropout)
        ctx.save_for_backward(
            x if needs_a else None, s if needs_b else None, a, keys, kept, *weights, *b_s
        )
        ctx.settings, ctx.scales, ctx.rows = settings, scales, x.shape[0]
        ctx.set_materialize_grads(False)
        return tuple(ys)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        n = len(ctx.scales)
        x, s, a, keys, kept, *others = ctx.saved_tensors
        weights, b_s = others[:n], others[n:]
        needs_x, needs_a = ctx.needs_input_grad[:2]
        ds = a.new_empty(ctx.rows, a.shape[0])
        dx: Tensor | None = None
        dbs: list[Tensor | None] = []
        start = 0
        for i, (dy, weight, b, scale) in enumerate(
            zip(grads, weights, b_s, ctx.scales, strict=True)
        ):
            part = slice(start, start + b.shape[1])
            start = part.stop
            if dy is None:
                # an output that nothing was made of
                ds[:, part] = 0
                dbs.append(None)
                continue
            s_part = s[:, part] if ctx.needs_input_grad[5 + 2 * n + i] else None
            dbs.append(ds_db(dy, b, s_part, scale, ds[:, part] if needs_x or needs_a else None))
            if needs_x:
                w = weight.to(dy.dtype)
                dx = dy @ w if dx is None else dx.addmm_(dy, w)
        da: Tensor | None = None
        sizes, way = _group(ds, a)
        dropout = row_ops.mask_for(keys, ctx.settings, kept, sizes, a, way)
        if needs_a:
            if dropout is None:
                da = ds.T @ x
            else:
                da = row_ops.factor_grads(ds, x, sizes, dropout, way)[0]
        if dx is not None:
            if dropout is None:
                dx.addmm_(ds, a)
            else:
                row_ops.expand_(dx, ds, a.T[None], sizes, dropout, way)
        return (dx, da, None, None, None, *[None] * (2 * n), *dbs)


def _group(rows: Tensor, a: Tensor) -> tuple[list[int], str]:
    """All rows as one group, and the way of a product with a masked side."""
    sizes = [rows.shape[0]]
    return sizes, row_ops.way_of(rows, a.shape[0], (a.shape[1],), sizes, masked=True)
