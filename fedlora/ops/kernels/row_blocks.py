"""What launches over groups of rows share: the table of blocks, and sums of parts.

A block holds rows of one group only. The table of blocks is made on the host from the sizes of
the groups and kept on the device, so that a captured graph can use it again.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from fedlora.ops.dropout_mask import Dropout, threshold
from fedlora.ops.kernels.aot_case import AotCase

SUM_BLOCK = 1024
SUM_WARPS = 4
# types of `mask_arguments`
MASK_SIGNATURE = {"keys": "*i64", "tokens": "i32", "stream": "i32", "threshold": "i32"}


@triton.jit
def sum_parts_kernel(
    parts,  # (P, N) float32
    bounds,  # (K + 1,) int32: parts of group k are bounds[k] to bounds[k + 1]
    out,  # (K, rows, cols) with N = rows cols
    N,
    cols,
    stride_k,
    stride_r,
    stride_c,
    scale,
    BLOCK: tl.constexpr,
):
    group = tl.program_id(1)
    wide = group.to(tl.int64)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < N
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for part in range(tl.load(bounds + group), tl.load(bounds + group + 1)):
        total += tl.load(parts + tl.cast(part, tl.int64) * N + at, mask=inside, other=0.0)
    place = wide * stride_k + at // cols * stride_r + at % cols * stride_c
    tl.store(out + place, (total * scale).to(out.dtype.element_ty), mask=inside)


def sum_parts(parts: Tensor, bounds: Tensor, out: Tensor, scale: float = 1.0) -> None:
    """out_k = scale times the sum of group k's parts, always in the same order.

    Args:
        parts: (P, rows, cols) float32.
        bounds: (K + 1,) int32, see the kernel.
        out: (K, rows, cols), any strides; overwritten.
    """
    count, rows, cols = out.shape
    grid = (triton.cdiv(rows * cols, SUM_BLOCK), count)
    if grid[0] and count:
        sum_parts_kernel[grid](
            parts,
            bounds,
            out,
            rows * cols,
            cols,
            *out.stride(),
            scale,
            BLOCK=SUM_BLOCK,
            num_warps=SUM_WARPS,
        )


@lru_cache(maxsize=256)
def blocks(sizes: tuple[int, ...], block: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The table for `row_block`, (blocks, 4) int32, and where a group's blocks begin, (K + 1,)."""
    table, bounds, start = [], [0], 0
    for group, size in enumerate(sizes):
        end = start + size
        table += [(group, first, end, start) for first in range(start, end, block)]
        bounds.append(len(table))
        start = end
    rows = torch.tensor(table, dtype=torch.int32, device="cpu").reshape(-1, 4)
    return rows.to(device), torch.tensor(bounds, dtype=torch.int32, device="cpu").to(device)


def narrow(x: Tensor) -> bool:
    """Whether the interpreter would multiply bit patterns instead of numbers."""
    return x.device.type == "cpu" and x.dtype.itemsize == 2


def rows_of(x: Tensor) -> Tensor:
    """`x` (M, k) with neighbouring columns next to each other in memory."""
    return x if x.stride(1) == 1 else x.contiguous()


def rank_tile(rank: int, most: int) -> int:
    """Columns of a tile for factors of rank `rank`: a tensor core takes no fewer than 16."""
    return min(most, max(16, 1 << (rank - 1).bit_length()))


def mask_arguments(dropout: Dropout | None, other: Tensor) -> tuple[Tensor, int, int, int]:
    """Keys, tokens, stream and threshold for a launch, also where nothing is dropped."""
    if dropout is None:
        return other, 1, 0, 0
    return dropout.key, dropout.tokens, dropout.stream, threshold(dropout.rate)


def scale_of(dropout: Dropout | None, alpha: float) -> float:
    """What a product with a masked side is multiplied by."""
    return alpha if dropout is None else alpha * dropout.upscale


def many(sizes: Sequence[int]) -> bool:
    """Whether there is more than one group, and so a table."""
    return len(sizes) > 1


AOT = (
    AotCase(
        sum_parts_kernel,
        {
            **{"parts": "*fp32", "bounds": "*i32", "out": "*bf16", "N": "i32", "cols": "i32"},
            **{"stride_k": "i32", "stride_r": "i32", "stride_c": "i32", "scale": "fp32"},
        },
        {"BLOCK": SUM_BLOCK},
        SUM_WARPS,
    ),
)
