"""Root-mean-square norm and the shrinkage of its output, [X | X A^T] in one buffer.

One program per block of rows: one pass for the mean of squares, one that normalises, stores and
multiplies. The second finds most of its rows in the cache.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fedlora.ops.kernels.aot_case import AotCase
from fedlora.ops.kernels.row_blocks import narrow, rank_tile, rows_of

# bytes of a number -> (rows, columns at once, most ranks, warps, stages)
CONFIGS = {2: (16, 128, 64, 4, 3), 4: (16, 64, 64, 4, 2)}


@triton.jit
def rmsnorm_shrink_kernel(
    x,  # (M, K)
    weight,  # (K,)
    a,  # (R, K)
    out,  # (M, K + R)
    M,
    K,
    R,
    stride_x,
    stride_ar,
    stride_ak,
    stride_out,
    eps,
    WIDEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    ranks = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    x += rows.to(tl.int64)[:, None] * stride_x
    out += rows.to(tl.int64)[:, None] * stride_out
    squares = tl.zeros((BLOCK_M, BLOCK_K), dtype=tl.float32)
    for column in range(0, K, BLOCK_K):
        cols = column + tl.arange(0, BLOCK_K)
        inside = (rows[:, None] < M) & (cols[None, :] < K)
        tile = tl.load(x + cols[None, :], mask=inside, other=0.0).to(tl.float32)
        squares += tile * tile
    size = tl.rsqrt(tl.sum(squares, 1) / K + eps)
    total = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    # every tile of ranks normalises, the first one stores
    stored = tl.where(tl.program_id(1) == 0, K, 0)
    for column in range(0, K, BLOCK_K):
        cols = column + tl.arange(0, BLOCK_K)
        inside = (rows[:, None] < M) & (cols[None, :] < K)
        tile = tl.load(x + cols[None, :], mask=inside, other=0.0).to(tl.float32)
        gain = tl.load(weight + cols, mask=cols < K, other=0.0).to(tl.float32)
        # rounded before the gain, as the models that are normalised so were trained
        unit = (tile * size[:, None]).to(x.dtype.element_ty).to(tl.float32)
        normed = (unit * gain[None, :]).to(out.dtype.element_ty)
        tl.store(out + cols[None, :], normed, mask=inside & (cols[None, :] < stored))
        right = tl.load(
            a + cols[:, None] * stride_ak + ranks[None, :] * stride_ar,
            mask=(cols[:, None] < K) & (ranks[None, :] < R),
            other=0.0,
        )
        left = normed
        if WIDEN:
            left, right = left.to(tl.float32), right.to(tl.float32)
        total = tl.dot(left, right, total, input_precision="ieee")
    tl.store(
        out + K + ranks[None, :],
        total.to(out.dtype.element_ty),
        mask=(rows[:, None] < M) & (ranks[None, :] < R),
    )


def rmsnorm_shrink(x: Tensor, weight: Tensor, a: Tensor, eps: float) -> Tensor:
    """[X | X A^T] (M, k + r) of x (M, k), weight (k,) and a (r, k), of one number format."""
    x = rows_of(x)
    block_m, block_k, most, warps, stages = CONFIGS[x.dtype.itemsize]
    (count, width), rank = x.shape, len(a)
    block_r = rank_tile(rank, most)
    out = torch.empty(count, width + rank, dtype=x.dtype, device=x.device)
    if out.numel():
        rmsnorm_shrink_kernel[(triton.cdiv(count, block_m), triton.cdiv(rank, block_r))](
            x,
            weight.contiguous(),
            a,
            out,
            count,
            width,
            rank,
            x.stride(0),
            *a.stride(),
            out.stride(0),
            eps,
            WIDEN=narrow(x),
            BLOCK_M=block_m,
            BLOCK_K=block_k,
            BLOCK_R=block_r,
            num_warps=warps,
            num_stages=stages,
        )
    return out


def _case(kind: str, rank: int) -> AotCase:
    block_m, block_k, most, warps, stages = CONFIGS[4 if kind == "fp32" else 2]
    numbers = ("M", "K", "R", "stride_x", "stride_ar", "stride_ak", "stride_out")
    signature = {
        **{"x": f"*{kind}", "weight": f"*{kind}", "a": f"*{kind}", "out": f"*{kind}"},
        **dict.fromkeys(numbers, "i32"),
        "eps": "fp32",
    }
    return AotCase(
        rmsnorm_shrink_kernel,
        signature,
        {
            "WIDEN": False,
            **{"BLOCK_M": block_m, "BLOCK_K": block_k, "BLOCK_R": rank_tile(rank, most)},
        },
        warps,
        stages,
    )


AOT = (_case("bf16", 16), _case("bf16", 64), _case("fp32", 64))
