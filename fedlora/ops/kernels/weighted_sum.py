"""A weighted sum over examples, which reads no example of weight 0."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fedlora.ops.kernels.aot_case import AotCase

BLOCK = 1024
WARPS = 4


@triton.jit
def weighted_sum_kernel(
    grads,  # (N, P)
    weights,  # (N,) float32
    out,  # (P,) float32
    N,
    P,
    BLOCK: tl.constexpr,
):
    cols = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for n in range(0, N):
        weight = tl.load(weights + n)
        # not a product with zero, which NaN survives
        end = tl.where(weight != 0, P, 0)
        row = tl.load(grads + cols, mask=cols < end, other=0.0).to(tl.float32)
        total += weight * row
        grads += P
    tl.store(out + cols, total, mask=cols < P)


def weighted_sum(grads: Tensor, weights: Tensor) -> Tensor:
    """sum_n w_n g_n (*shape) in float32, of (N, *shape) and (N,)."""
    out = torch.empty(grads.shape[1:], dtype=torch.float32, device=grads.device)
    size = out.numel()
    weighted_sum_kernel[(triton.cdiv(size, BLOCK),)](
        grads.contiguous(), weights, out, len(grads), size, BLOCK=BLOCK, num_warps=WARPS
    )
    return out


AOT = tuple(
    AotCase(
        weighted_sum_kernel,
        {"grads": f"*{kind}", "weights": "*fp32", "out": "*fp32", "N": "i32", "P": "i32"},
        {"BLOCK": BLOCK},
        WARPS,
    )
    for kind in ("bf16", "fp32")
)
