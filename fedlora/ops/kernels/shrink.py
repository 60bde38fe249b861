"""S_i = dropout(x_i) A_i^T over groups of rows: one program per block of rows and tile of ranks."""

from collections.abc import Sequence

import torch
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
    rows_of,
    scale_of,
)

# bytes of a number -> (rows, columns at once, most ranks, warps, stages)
CONFIGS = {2: (64, 64, 64, 4, 4), 4: (32, 32, 64, 4, 3)}


@triton.jit
def shrink_kernel(
    x,  # (M, K)
    a,  # (groups, R, K)
    s,  # (M, R), contiguous
    table,
    M,
    K,
    R,
    stride_x,
    stride_ag,
    stride_ar,
    stride_ak,
    keys,  # (groups,) int64, or anything without DROPOUT
    tokens,
    stream,
    threshold,
    scale,
    TABLE: tl.constexpr,
    DROPOUT: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    group, first, end, start = rows_part.row_block(table, M, TABLE, BLOCK_M)
    rows = first + tl.arange(0, BLOCK_M)
    ranks = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    x += rows.to(tl.int64)[:, None] * stride_x
    a += tl.cast(group, tl.int64) * stride_ag + ranks[None, :] * stride_ar
    if DROPOUT:
        key = tl.load(keys + group)
    total = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    for column in range(0, K, BLOCK_K):
        cols = column + tl.arange(0, BLOCK_K)
        # [BM, BK] and [BK, BR]
        left = tl.load(
            x + cols[None, :], mask=(rows[:, None] < end) & (cols[None, :] < K), other=0.0
        )
        right = tl.load(
            a + cols[:, None] * stride_ak,
            mask=(cols[:, None] < K) & (ranks[None, :] < R),
            other=0.0,
        )
        if DROPOUT:
            kept = rows_part.keep(
                key, rows - start, tokens, stream, column, threshold, BLOCK_M, BLOCK_K
            )
            left = tl.where(kept, left, tl.zeros_like(left))
        if WIDEN:
            left, right = left.to(tl.float32), right.to(tl.float32)
        total = tl.dot(left, right, total, input_precision="ieee")
    tl.store(
        s + rows.to(tl.int64)[:, None] * R + ranks[None, :],
        (total * scale).to(s.dtype.element_ty),
        mask=(rows[:, None] < end) & (ranks[None, :] < R),
    )


def shrink(
    x: Tensor, a: Tensor, sizes: Sequence[int], dropout: Dropout | None, alpha: float
) -> Tensor:
    """(M, r) of rows x (M, k) and factors a (K, r, k) of any strides; see `row_groups.shrink`."""
    x = rows_of(x)
    block_m, block_k, most, warps, stages = CONFIGS[x.dtype.itemsize]
    rank = a.shape[1]
    block_r = rank_tile(rank, most)
    table, _ = blocks(tuple(sizes), block_m, x.device)
    s = torch.empty(len(x), rank, dtype=x.dtype, device=x.device)
    if s.numel():
        shrink_kernel[(len(table), triton.cdiv(rank, block_r))](
            x,
            a,
            s,
            table,
            len(x),
            x.shape[1],
            rank,
            x.stride(0),
            *a.stride(),
            *mask_arguments(dropout, table),
            scale_of(dropout, alpha),
            TABLE=many(sizes),
            DROPOUT=dropout is not None,
            WIDEN=narrow(x),
            BLOCK_M=block_m,
            BLOCK_K=block_k,
            BLOCK_R=block_r,
            num_warps=warps,
            num_stages=stages,
        )
    return s


def _case(kind: str, rank: int, dropout: bool, table: bool) -> AotCase:
    block_m, block_k, most, warps, stages = CONFIGS[4 if kind == "fp32" else 2]
    numbers = ("M", "K", "R", "stride_x", "stride_ag", "stride_ar", "stride_ak")
    signature = {
        **{"x": f"*{kind}", "a": f"*{kind}", "s": f"*{kind}", "table": "*i32"},
        **dict.fromkeys(numbers, "i32"),
        **MASK_SIGNATURE,
        "scale": "fp32",
    }
    return AotCase(
        shrink_kernel,
        signature,
        {
            **{"TABLE": table, "DROPOUT": dropout, "WIDEN": False},
            **{"BLOCK_M": block_m, "BLOCK_K": block_k, "BLOCK_R": rank_tile(rank, most)},
        },
        warps,
        stages,
    )


AOT = (
    _case("bf16", 16, True, False),
    _case("bf16", 64, True, True),
    _case("bf16", 64, True, True),
    _case("fp32", 64, True, True),
)
