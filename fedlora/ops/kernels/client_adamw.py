"""AdamW of many clients in one launch; every number is read and written once."""

import triton
import triton.language as tl
from torch import Tensor

from fedlora.ops.kernels.aot_case import AotCase

BLOCK = 1024
WARPS = 4


@triton.jit
def client_adamw_kernel(
    parameters,  # (K, P) float32, as the moments
    first,
    second,
    narrow,  # (K, P), or anything without NARROW
    grads,  # (K, P)
    by_client,  # (K, 4) float32
    active,  # (K,) bool
    multiplier,  # (P,), or anything without MULTIPLIER
    P,
    # of a row of the buffers, of the copy and of the gradients
    stride,
    stride_narrow,
    stride_grads,
    beta2,
    # 1 - beta, which float32 numbers would not give
    rest1,
    rest2,
    eps,
    NARROW: tl.constexpr,
    MULTIPLIER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    k = tl.program_id(1).to(tl.int64)
    cols = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    # rows of others are neither read nor written
    mask = cols < tl.where(tl.load(active + k), P, 0)
    scale = tl.load(by_client + 4 * k)
    decay = tl.load(by_client + 4 * k + 1)
    size = tl.load(by_client + 4 * k + 2)
    bias = tl.load(by_client + 4 * k + 3)
    at = k * stride + cols
    g = tl.load(grads + k * stride_grads + cols, mask=mask, other=0.0).to(tl.float32) * scale
    p = tl.load(parameters + at, mask=mask, other=0.0)
    m = tl.load(first + at, mask=mask, other=0.0)
    v = tl.load(second + at, mask=mask, other=0.0)
    if MULTIPLIER:
        factor = tl.load(multiplier + cols, mask=mask, other=0.0).to(tl.float32)
        decay = decay * factor
        size = size * factor
    m += (g - m) * rest1
    v = v * beta2 + g * g * rest2
    p = p * (1.0 - decay)
    # division and root of a GPU are otherwise not those of IEEE
    p -= tl.div_rn(size * m, tl.div_rn(tl.sqrt_rn(v), bias) + eps)
    tl.store(parameters + at, p, mask=mask)
    tl.store(first + at, m, mask=mask)
    tl.store(second + at, v, mask=mask)
    if NARROW:
        tl.store(narrow + k * stride_narrow + cols, p.to(narrow.dtype.element_ty), mask=mask)


def client_adamw_(
    buffers: tuple[Tensor, Tensor, Tensor, Tensor | None],
    grads: Tensor,
    by_client: Tensor,
    active: Tensor,
    multiplier: Tensor | None,
    betas: tuple[float, float],
    eps: float,
) -> None:
    """One step in place; see `fedlora.ops.client_adamw`.

    Args:
        buffers: parameters, first and second moments (K, P) float32, and a narrow copy or None.
            All may be columns of wider buffers; the first three of equally wide ones.
    """
    parameters, first, second, narrow = buffers
    count, size = parameters.shape
    copy = parameters if narrow is None else narrow
    assert parameters.stride() == first.stride() == second.stride()
    assert parameters.stride(1) == copy.stride(1) == grads.stride(1) == 1
    client_adamw_kernel[(triton.cdiv(size, BLOCK), count)](
        parameters,
        first,
        second,
        copy,
        grads,
        by_client,
        active,
        parameters if multiplier is None else multiplier,
        size,
        parameters.stride(0),
        copy.stride(0),
        grads.stride(0),
        betas[1],
        1.0 - betas[0],
        1.0 - betas[1],
        eps,
        NARROW=narrow is not None,
        MULTIPLIER=multiplier is not None,
        BLOCK=BLOCK,
        num_warps=WARPS,
    )


AOT = tuple(
    AotCase(
        client_adamw_kernel,
        {
            **dict.fromkeys(("parameters", "first", "second", "by_client", "multiplier"), "*fp32"),
            **{"narrow": "*bf16", "grads": "*bf16", "active": "*i1"},
            **dict.fromkeys(("P", "stride", "stride_narrow", "stride_grads"), "i32"),
            **dict.fromkeys(("beta2", "rest1", "rest2", "eps"), "fp32"),
        },
        {"NARROW": whole, "MULTIPLIER": whole, "BLOCK": BLOCK},
        WARPS,
    )
    for whole in (True, False)
)
