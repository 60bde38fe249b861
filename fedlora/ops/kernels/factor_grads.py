"""g_i^T dropout(x_i) over groups of rows: parts of each chunk of rows, then their sum.

Parts instead of atomic additions, so that the same inputs give the same bits.
"""

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
    sum_parts,
)

# bytes of a number -> (rows of a chunk, rows at once, columns, most ranks, warps, stages)
CONFIGS = {2: (1024, 64, 64, 64, 4, 3), 4: (1024, 32, 32, 64, 4, 3)}


@triton.jit
def factor_grads_kernel(
    g,  # (M, R)
    x,  # (M, K)
    parts,  # (chunks, R, K) float32
    table,
    M,
    K,
    R,
    stride_gm,
    stride_gr,
    stride_x,
    keys,  # (groups,) int64, or anything without DROPOUT
    tokens,
    stream,
    threshold,
    TABLE: tl.constexpr,
    DROPOUT: tl.constexpr,
    WIDEN: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    group, first, end, start = rows_part.row_block(table, M, TABLE, CHUNK)
    column = tl.program_id(1) * BLOCK_K
    cols = column + tl.arange(0, BLOCK_K)
    ranks = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    if DROPOUT:
        key = tl.load(keys + group)
    total = tl.zeros((BLOCK_K, BLOCK_R), dtype=tl.float32)
    for row in range(first, tl.minimum(first + CHUNK, end), BLOCK_M):
        rows = row + tl.arange(0, BLOCK_M)
        wide = rows.to(tl.int64)
        # [BM, BK] and [BM, BR]
        left = tl.load(
            x + wide[:, None] * stride_x + cols[None, :],
            mask=(rows[:, None] < end) & (cols[None, :] < K),
            other=0.0,
        )
        right = tl.load(
            g + wide[:, None] * stride_gm + ranks[None, :] * stride_gr,
            mask=(rows[:, None] < end) & (ranks[None, :] < R),
            other=0.0,
        )
        if DROPOUT:
            kept = rows_part.keep(
                key, rows - start, tokens, stream, column, threshold, BLOCK_M, BLOCK_K
            )
            left = tl.where(kept, left, tl.zeros_like(left))
        if WIDEN:
            left, right = left.to(tl.float32), right.to(tl.float32)
        total = tl.dot(tl.trans(left), right, total, input_precision="ieee")
    parts += tl.program_id(0).to(tl.int64) * R * K
    tl.store(
        parts + ranks[None, :].to(tl.int64) * K + cols[:, None],
        total,
        mask=(cols[:, None] < K) & (ranks[None, :] < R),
    )


def factor_grads(
    g: Tensor, x: Tensor, sizes: Sequence[int], dropout: Dropout | None, alpha: float
) -> Tensor:
    """(K, r, k) of rows g (M, r) and x (M, k); see `row_groups.factor_grads`."""
    x = rows_of(x)
    chunk, block_m, block_k, most, warps, stages = CONFIGS[x.dtype.itemsize]
    rank, width = g.shape[1], x.shape[1]
    block_r = rank_tile(rank, most)
    table, bounds = blocks(tuple(sizes), chunk, x.device)
    parts = torch.empty(len(table), rank, width, dtype=torch.float32, device=x.device)
    if parts.numel():
        factor_grads_kernel[(len(table), triton.cdiv(width, block_k), triton.cdiv(rank, block_r))](
            g,
            x,
            parts,
            table,
            len(x),
            width,
            rank,
            *g.stride(),
            x.stride(0),
            *mask_arguments(dropout, table),
            TABLE=many(sizes),
            DROPOUT=dropout is not None,
            WIDEN=narrow(x),
            CHUNK=chunk,
            BLOCK_M=block_m,
            BLOCK_K=block_k,
            BLOCK_R=block_r,
            num_warps=warps,
            num_stages=stages,
        )
    grads = torch.empty(len(sizes), rank, width, dtype=x.dtype, device=x.device)
    sum_parts(parts, bounds, grads, scale_of(dropout, alpha))
    return grads


def _case(kind: str, rank: int, dropout: bool, table: bool) -> AotCase:
    chunk, block_m, block_k, most, warps, stages = CONFIGS[4 if kind == "fp32" else 2]
    numbers = ("M", "K", "R", "stride_gm", "stride_gr", "stride_x")
    signature = {
        **{"g": f"*{kind}", "x": f"*{kind}", "parts": "*fp32", "table": "*i32"},
        **dict.fromkeys(numbers, "i32"),
        **MASK_SIGNATURE,
    }
    return AotCase(
        factor_grads_kernel,
        signature,
        {
            **{"TABLE": table, "DROPOUT": dropout, "WIDEN": False, "CHUNK": chunk},
            **{"BLOCK_M": block_m, "BLOCK_K": block_k, "BLOCK_R": rank_tile(rank, most)},
        },
        warps,
        stages,
    )


AOT = (
    _case("bf16", 16, True, False),
    _case("bf16", 64, True, True),
    _case("fp32", 64, True, True),
)
