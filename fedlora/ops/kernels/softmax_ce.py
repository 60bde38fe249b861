"""Softmax cross-entropy over rows of logits, which become the gradient in place.

One program per row, two passes: the largest logit and the sum of exponentials together, as in
Milakov and Gimelshein, "Online normalizer calculation for softmax",
https://arxiv.org/abs/1805.02867, algorithm 3; then the gradient over the logits. Logits are read
once more than a fused product would, but the product stays the vendor's.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fedlora.ops.kernels.aot_case import AotCase

BLOCK = 4096
WARPS = 8


@triton.jit
def softmax_ce_kernel(
    logits,  # (M, V), becomes softmax - one-hot if SLOPES
    target,  # (M,) int64; below 0 where nothing counts
    losses,  # (M,) float32
    right,  # (M,) bool
    V,
    SLOPES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits += row * V
    place = tl.load(target + row)
    largest = -float("inf")
    best = 0
    total = 0.0
    for start in range(0, V, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        x = tl.load(logits + cols, mask=cols < V, other=-float("inf")).to(tl.float32)
        top, at = tl.max(x, 0, return_indices=True)
        # of equal logits the first
        best = tl.where(top > largest, start + at, best)
        above = tl.maximum(largest, top)
        # a block of nothing but -inf must not make inf - inf
        shift = tl.where(above == -float("inf"), 0.0, above)
        total = total * tl.exp(largest - shift) + tl.sum(tl.exp(x - shift), 0)
        largest = above
    counted = place >= 0
    # a target beyond the vocabulary must not pass for a loss
    inside = counted & (place < V)
    chosen = tl.load(logits + place, mask=inside, other=float("nan")).to(tl.float32)
    tl.store(losses + row, tl.where(counted, tl.log(total) - (chosen - largest), 0.0))
    tl.store(right + row, inside & (best == place))
    if SLOPES:
        scale = tl.where(counted, 1.0 / total, 0.0)
        for start in range(0, V, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            x = tl.load(logits + cols, mask=cols < V, other=-float("inf")).to(tl.float32)
            p = tl.exp(x - largest) * scale - tl.where(cols == place, 1.0, 0.0)
            tl.store(logits + cols, p.to(logits.dtype.element_ty), mask=cols < V)


def softmax_ce_(logits: Tensor, target: Tensor, slopes: bool) -> tuple[Tensor, Tensor]:
    """(losses (M,) float32, right (M,) bool); `logits` become their gradient if `slopes`.

    Args:
        logits: (M, V), contiguous, at most float32.
        target: (M,) int64, negative where nothing counts.
    """
    assert logits.is_contiguous()
    count, vocabulary = logits.shape
    losses = torch.empty(count, dtype=torch.float32, device=logits.device)
    right = torch.empty(count, dtype=torch.bool, device=logits.device)
    softmax_ce_kernel[(count,)](
        logits,
        target.contiguous(),
        losses,
        right,
        vocabulary,
        SLOPES=slopes,
        BLOCK=min(BLOCK, triton.next_power_of_2(vocabulary)),
        num_warps=WARPS,
    )
    return losses, right


AOT = tuple(
    AotCase(
        softmax_ce_kernel,
        {"logits": f"*{kind}", "target": "*i64", "losses": "*fp32", "right": "*i1", "V": "i32"},
        {"SLOPES": slopes, "BLOCK": BLOCK},
        WARPS,
    )
    for kind in ("bf16", "fp32")
    for slopes in (True, False)
)
