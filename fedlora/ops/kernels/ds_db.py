"""dS = s dY B and dB = s dY^T S in one pass over dY, over groups of rows.

A program takes a block of rows and a span of columns; its part of dS is over its columns and its
part of dB over its rows, and both are summed afterwards, always in the same order.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fedlora.ops.kernels.aot_case import AotCase
from fedlora.ops.kernels.parts import rows as rows_part
from fedlora.ops.kernels.row_blocks import (
    blocks,
    many,
    narrow,
    rank_tile,
    rows_of,
    sum_parts,
)

# bytes of a number -> (rows, columns at once, most ranks, warps, stages); 64 ranks at once fit
# in the registers only if every row begins at a multiple of 16 bytes
CONFIGS = {2: (128, 64, 32, 8, 3), 4: (32, 16, 32, 4, 2)}
SPAN = 1024


@triton.jit
def ds_db_kernel(
    dy,  # (M, N)
    b,  # (groups, N, R)
    s,  # (M, R)
    ds_parts,  # (spans, M, R) float32
    db_parts,  # (blocks, N, R) float32
    table,
    M,
    N,
    R,
    stride_y,
    stride_bg,
    stride_bn,
    stride_br,
    stride_sm,
    stride_sr,
    TABLE: tl.constexpr,
    WIDEN: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    group, first, end, _start = rows_part.row_block(table, M, TABLE, BLOCK_M)
    rows = first + tl.arange(0, BLOCK_M)
    wide = rows.to(tl.int64)
    ranks = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    span = tl.program_id(1) * SPAN
    inside = (rows[:, None] < end) & (ranks[None, :] < R)
    s_tile = tl.load(
        s + wide[:, None] * stride_sm + ranks[None, :] * stride_sr, mask=inside, other=0.0
    )
    if WIDEN:
        s_tile = s_tile.to(tl.float32)
    b += tl.cast(group, tl.int64) * stride_bg + ranks[None, :] * stride_br
    db_parts += tl.program_id(0).to(tl.int64) * N * R
    total = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    for column in range(span, tl.minimum(span + SPAN, N), BLOCK_N):
        cols = column + tl.arange(0, BLOCK_N)
        # [BM, BN] and [BN, BR]
        g = tl.load(
            dy + wide[:, None] * stride_y + cols[None, :],
            mask=(rows[:, None] < end) & (cols[None, :] < N),
            other=0.0,
        )
        reach = (cols[:, None] < N) & (ranks[None, :] < R)
        right = tl.load(b + cols[:, None].to(tl.int64) * stride_bn, mask=reach, other=0.0)
        if WIDEN:
            g, right = g.to(tl.float32), right.to(tl.float32)
        total = tl.dot(g, right, total, input_precision="ieee")
        part = tl.dot(tl.trans(g), s_tile, input_precision="ieee")
        tl.store(db_parts + cols[:, None].to(tl.int64) * R + ranks[None, :], part, mask=reach)
    ds_parts += tl.program_id(1).to(tl.int64) * M * R
    tl.store(ds_parts + wide[:, None] * R + ranks[None, :], total, mask=inside)


def ds_db(
    dy: Tensor, b: Tensor, s: Tensor, sizes: Sequence[int], scale: float, ds: Tensor
) -> Tensor:
    """Writes scale dy_i B_i to `ds` (M, r), of any strides; gives scale dy_i^T s_i, (K, d, r).

    Args:
        dy: (M, d).
        b: (K, d, r), any strides; its number format is that of the result.
        s: (M, r), any strides.
        sizes: rows of each group.
        scale: of both.
        ds: overwritten.
    """
    dy = rows_of(dy)
    block_m, block_n, most, warps, stages = CONFIGS[dy.dtype.itemsize]
    (count, out), rank = dy.shape, s.shape[1]
    block_r = rank_tile(rank, most)
    table, bounds = blocks(tuple(sizes), block_m, dy.device)
    spans = triton.cdiv(out, SPAN)
    ds_parts = torch.empty(spans, count, rank, dtype=torch.float32, device=dy.device)
    db_parts = torch.empty(len(table), out, rank, dtype=torch.float32, device=dy.device)
    db = torch.empty(len(sizes), out, rank, dtype=b.dtype, device=dy.device)
    if dy.numel():
        ds_db_kernel[(len(table), spans, triton.cdiv(rank, block_r))](
            dy,
            b,
            s,
            ds_parts,
            db_parts,
            table,
            count,
            out,
            rank,
            dy.stride(0),
            *b.stride(),
            *s.stride(),
            TABLE=many(sizes),
            WIDEN=narrow(dy),
            SPAN=SPAN,
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            BLOCK_R=block_r,
            num_warps=warps,
            num_stages=stages,
        )
    # the parts of dS are one group
    _, whole = blocks((spans,), 1, dy.device)
    sum_parts(ds_parts, whole, ds[None], scale)
    sum_parts(db_parts, bounds, db, scale)
    return db


def _case(kind: str, rank: int, table: bool) -> AotCase:
    block_m, block_n, most, warps, stages = CONFIGS[4 if kind == "fp32" else 2]
    numbers = ("M", "N", "R", "stride_y", "stride_bg", "stride_bn", "stride_br", "stride_sm")
    signature = {
        **{"dy": f"*{kind}", "b": f"*{kind}", "s": f"*{kind}", "table": "*i32"},
        **{"ds_parts": "*fp32", "db_parts": "*fp32"},
        **dict.fromkeys((*numbers, "stride_sr"), "i32"),
    }
    return AotCase(
        ds_db_kernel,
        signature,
        {
            **{"TABLE": table, "WIDEN": False, "SPAN": SPAN},
            **{"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_R": rank_tile(rank, most)},
        },
        warps,
        stages,
    )


AOT = (
    _case("bf16", 16, False),
    _case("bf16", 64, True),
    _case("bf16", 64, True),
    _case("fp32", 64, True),
)
