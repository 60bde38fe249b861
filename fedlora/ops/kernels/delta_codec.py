"""A delta as integers, one scale a block; every number is read and written once."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fedlora.ops import delta_codec, dropout_mask
from fedlora.ops.kernels.aot_case import AotCase

BLOCK = tl.constexpr(delta_codec.BLOCK)
LEAST_SCALE = tl.constexpr(delta_codec.LEAST_SCALE)
ROUNDS = tl.constexpr(dropout_mask.ROUNDS)
# blocks of a program, and warps
BLOCKS, WARPS = 8, 4


@triton.jit
def encode_kernel(
    delta,  # (N,) float32
    owed,  # (N,) float32, or anything without OWED
    key,  # int64, or anything without RANDOM
    codes,  # (N,) int8
    scales,  # (M,) bfloat16, as int16
    left,  # (N,) float32, or anything without OWED
    N,
    M,
    levels,  # float32
    OWED: tl.constexpr,
    RANDOM: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    at = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]  # [BLOCKS, BLOCK]
    inside = at < N
    x = tl.load(delta + at, mask=inside, other=0.0)
    if OWED:
        x += tl.load(owed + at, mask=inside, other=0.0)
    # a maximum that loses no NaN: it is the only number that differs from itself
    largest = tl.max(tl.where(x == x, tl.abs(x), 0.0), 1)
    strange = tl.max((x != x).to(tl.int32), 1) > 0
    wanted = tl.div_rn(largest, levels + tl.zeros_like(largest))
    bits = wanted.to(tl.int32, bitcast=True)
    # by hand, as the interpreter cuts off where a GPU rounds
    if RANDOM:
        rounded = (bits + 0xFFFF) & -65536
    else:
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
    rounded = tl.where(wanted < float("inf"), rounded, bits)
    rounded = tl.where(strange, 0x7FC00000, rounded)
    scale = rounded.to(tl.float32, bitcast=True)
    scale = tl.where(scale < LEAST_SCALE, 0.0, scale)
    tl.store(scales + block, (scale.to(tl.int32, bitcast=True) >> 16).to(tl.int16), mask=block < M)
    wide = scale[:, None] + tl.zeros_like(x)
    steps = tl.div_rn(x, tl.where(wide > 0.0, wide, 1.0))
    steps = tl.where((steps == steps) & (wide > 0.0), steps, 0.0)
    steps = tl.minimum(tl.maximum(steps, -levels - 1.0), levels + 1.0)
    if RANDOM:
        group = (block[:, None] * (BLOCK // 4) + tl.arange(0, BLOCK // 4)[None, :]).to(tl.int32)
        zero = tl.zeros_like(group)
        w0, w1, w2, w3 = tl.philox(tl.load(key), group, zero, zero, zero, n_rounds=ROUNDS)
        words = tl.join(tl.join(w0 >> 8, w2 >> 8), tl.join(w1 >> 8, w3 >> 8))
        draws = (
            tl.reshape(words, (BLOCKS, BLOCK)).to(tl.int32).to(tl.float32) * 5.9604644775390625e-08
        )
        code = tl.floor(steps + draws)
    else:
        # to the nearest, ties to even: adding 1.5 * 2**23 leaves no bits below one
        code = (steps + 12582912.0) - 12582912.0
    code = tl.minimum(tl.maximum(code, -levels), levels)
    tl.store(codes + at, code.to(tl.int8), mask=inside)
    if OWED:
        tl.store(left + at, x - code * wide, mask=inside)


def encode(
    delta: Tensor, owed: Tensor | None, key: Tensor | None, levels: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales and what is owed; see `fedlora.ops.delta_codec`."""
    delta = delta.contiguous()
    n = delta.numel()
    m = triton.cdiv(n, delta_codec.BLOCK)
    codes = torch.empty(n, dtype=torch.int8, device=delta.device)
    scales = torch.empty(m, dtype=torch.int16, device=delta.device)
    left = torch.empty(0 if owed is None else n, dtype=delta.dtype, device=delta.device)
    if n:
        encode_kernel[(triton.cdiv(m, BLOCKS),)](
            delta,
            delta if owed is None else owed.contiguous(),
            delta if key is None else key,
            codes,
            scales,
            delta if owed is None else left,
            n,
            m,
            float(levels),
            OWED=owed is not None,
            RANDOM=key is not None,
            BLOCKS=BLOCKS,
            num_warps=WARPS,
        )
    return codes, scales.view(torch.bfloat16), left


AOT = tuple(
    AotCase(
        encode_kernel,
        {
            **{"delta": "*fp32", "owed": "*fp32", "key": "*i64", "codes": "*i8"},
            **{"scales": "*i16", "left": "*fp32", "N": "i32", "M": "i32", "levels": "fp32"},
        },
        {"OWED": owed, "RANDOM": random, "BLOCKS": BLOCKS},
        WARPS,
    )
    for owed in (True, False)
    for random in (True, False)
)
