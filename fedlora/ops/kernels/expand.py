"""y_i += dropout(s_i B_i^T) in place over groups of rows: one program per tile of y."""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from fedlora.ops.dropout_mask import Dropout
from fedlora.ops.kernels.aot_case import AotCase
from fedlora.ops.kernels.parts import rows as rows_part
from fedlora.ops.kernels.row_blocks import (
    MASK_SIGNATURE,
    blocks,
    many,
    mask_arguments,
    narrow,
    rank_tile,
    scale_of,
)

# bytes of a number -> (rows, columns, most ranks at once, warps)
CONFIGS = {2: (64, 128, 64, 8), 4: (32, 32, 16, 4)}


@triton.jit
def expand_kernel(
    y,  # (M, N), changed
    s,  # (M, R)
    b,  # (groups, N, R)
    table,
    M,
    N,
    R,
    stride_y,
    stride_sm,
    stride_sr,
    stride_bg,
    stride_bn,
    stride_br,
    keys,  # (groups,) int64, or anything without DROPOUT
    tokens,
    stream,
    threshold,
    scale,
    TABLE: tl.constexpr,
    DROPOUT: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    group, first, end, start = rows_part.row_block(table, M, TABLE, BLOCK_M)
    rows = first + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_N
    cols = column + tl.arange(0, BLOCK_N)
    s += rows.to(tl.int64)[:, None] * stride_sm
    b += tl.cast(group, tl.int64) * stride_bg + cols[None, :].to(tl.int64) * stride_bn
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for rank in range(0, R, BLOCK_R):
        ranks = rank + tl.arange(0, BLOCK_R)
        # [BM, BR] and [BR, BN]
        left = tl.load(
            s + ranks[None, :] * stride_sr,
            mask=(rows[:, None] < end) & (ranks[None, :] < R),
            other=0.0,
        )
        right = tl.load(
            b + ranks[:, None] * stride_br,
            mask=(cols[None, :] < N) & (ranks[:, None] < R),
            other=0.0,
        )
        if WIDEN:
            left, right = left.to(tl.float32), right.to(tl.float32)
        total = tl.dot(left, right, total, input_precision="ieee")
    inside = (rows[:, None] < end) & (cols[None, :] < N)
    y += rows.to(tl.int64)[:, None] * stride_y + cols[None, :]
    if DROPOUT:
        key = tl.load(keys + group)
        kept = rows_part.keep(
            key, rows - start, tokens, stream, column, threshold, BLOCK_M, BLOCK_N
        )
        total = tl.where(kept, total, 0.0)
    sum = tl.load(y, mask=inside, other=0.0).to(tl.float32) + total * scale
    tl.store(y, sum.to(y.dtype.element_ty), mask=inside)


def expand_(
    y: Tensor, s: Tensor, b: Tensor, sizes: Sequence[int], dropout: Dropout | None, alpha: float
) -> None:
    """In place, for y (M, d), s (M, r) and b (K, d, r) of any strides; see `row_groups.expand_`."""
    assert y.stride(1) == 1
    block_m, block_n, most, warps = CONFIGS[y.dtype.itemsize]
    out, rank = y.shape[1], s.shape[1]
    table, _ = blocks(tuple(sizes), block_m, y.device)
    if not y.numel():
        return
    expand_kernel[(len(table), triton.cdiv(out, block_n))](
        y,
        s,
        b,
        table,
        len(y),
        out,
        rank,
        y.stride(0),
        *s.stride(),
        *b.stride(),
        *mask_arguments(dropout, table),
        scale_of(dropout, alpha),
        TABLE=many(sizes),
        DROPOUT=dropout is not None,
        WIDEN=narrow(y),
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_R=rank_tile(rank, most),
        num_warps=warps,
    )


def _case(kind: str, rank: int, dropout: bool, table: bool) -> AotCase:
    block_m, block_n, most, warps = CONFIGS[4 if kind == "fp32" else 2]
    numbers = ("M", "N", "R", "stride_y", "stride_sm", "stride_sr", "stride_bg", "stride_bn")
    signature = {
        **{"y": f"*{kind}", "s": f"*{kind}", "b": f"*{kind}", "table": "*i32"},
        **dict.fromkeys((*numbers, "stride_br"), "i32"),
        **MASK_SIGNATURE,
        "scale": "fp32",
    }
    return AotCase(
        expand_kernel,
        signature,
        {
            **{"TABLE": table, "DROPOUT": dropout, "WIDEN": False},
            **{"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_R": rank_tile(rank, most)},
        },
        warps,
    )


AOT = (
    _case("bf16", 16, True, False),
    _case("bf16", 64, False, True),
    _case("bf16", 64, True, True),
    _case("fp32", 64, True, True),
)
