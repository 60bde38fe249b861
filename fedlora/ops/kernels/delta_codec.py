"""Coding in one pass, and the weighted sum of many clients' codes in another.

The arithmetic is that of `fedlora.ops.delta_codec` to the last bit, so nothing is contracted
into a fused multiply-add. Scales are made of their bits: every device then rounds them alike.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fedlora.ops import dropout_mask
from fedlora.ops.kernels.aot_case import AotCase

BLOCK = 64
ROWS = 16
WARPS = 4
# the least normal number, infinity, and NaN, as bits of bfloat16
LEAST = tl.constexpr(0x0080)
NAN = tl.constexpr(0x7FC0)
ROUNDS = tl.constexpr(dropout_mask.ROUNDS)
# sums with it have no place for fractions: 1.5 * 2**23
WHOLE = tl.constexpr(12582912.0)


@triton.jit
def encode_kernel(
    delta,  # (n,) float32
    owed,  # (n,) float32, or anything without OWED
    key,  # () int64, or anything without RANDOM
    codes,  # (n,) int8
    scales,  # (n64,) int16: bfloat16 by its bits
    left,  # (n,) float32, or anything without FEEDBACK
    n,
    LEVELS: tl.constexpr,
    OWED: tl.constexpr,
    RANDOM: tl.constexpr,
    FEEDBACK: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    at = rows[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    mask = at < n
    x = tl.load(delta + at, mask=mask, other=0.0)
    if OWED:
        x += tl.load(owed + at, mask=mask, other=0.0)
    # a maximum does not carry NaN along everywhere
    broken = tl.max((x != x).to(tl.int32), axis=1) != 0
    size = tl.where(x == x, tl.abs(x), 0.0)
    largest = tl.max(size, axis=1)
    bits = tl.div_rn(largest, tl.full((ROWS,), LEVELS, tl.float32)).to(tl.int32, bitcast=True)
    if RANDOM:
        short = (bits + 0xFFFF) >> 16
        short = tl.where((largest > 0) & (short < LEAST), LEAST, short)
    else:
        short = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        short = tl.where(short < LEAST, 0, short)
    short = tl.where(broken, NAN, short)
    tl.store(scales + rows, short.to(tl.int16), mask=rows * BLOCK < n)
    scale = (short << 16).to(tl.float32, bitcast=True)[:, None]
    coded = (short > 0) & (short < 0x7F80)
    # a block that is not coded is divided by 1, and not by what no quotient is of
    size = tl.where(coded[:, None], size, 0.0)
    steps = tl.div_rn(size, tl.where(coded[:, None], scale, 1.0))
    steps = tl.minimum(steps, tl.full((ROWS, BLOCK), LEVELS, tl.float32))
    if RANDOM:
        groups = rows[:, None] * (BLOCK // 4) + tl.arange(0, BLOCK // 4)[None, :]
        zero = tl.zeros((ROWS, BLOCK // 4), dtype=tl.int32)
        w0, w1, w2, w3 = tl.philox(
            tl.load(key),
            groups.to(tl.int32),
            (groups >> 32).to(tl.int32),
            zero,
            zero,
            n_rounds=ROUNDS,
        )
        # joined dimensions are high and low bit of the word
        words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (ROWS, BLOCK))
        draws = (words >> 8).to(tl.int32).to(tl.float32) * (2.0**-24)
        below = tl.floor(steps)
        steps = below + (draws < steps - below).to(tl.float32)
    else:
        steps = (steps + WHOLE) - WHOLE
    steps = tl.where(x < 0, -steps, steps)
    tl.store(codes + at, steps.to(tl.int8), mask=mask)
    if FEEDBACK:
        tl.store(left + at, x - steps * scale, mask=mask)


def encode(
    delta: Tensor, levels: int, owed: Tensor | None, key: Tensor | None, feedback: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (n,), scales (n64,) and, with `feedback`, what is owed; see `fedlora.ops`."""
    n = delta.numel()
    blocks = triton.cdiv(n, BLOCK)
    delta = delta.contiguous()
    codes = torch.empty(n, dtype=torch.int8, device=delta.device)
    scales = torch.empty(blocks, dtype=torch.bfloat16, device=delta.device)
    left = torch.empty(n if feedback else 0, dtype=torch.float32, device=delta.device)
    encode_kernel[(triton.cdiv(blocks, ROWS),)](
        delta,
        delta if owed is None else owed.contiguous(),
        delta if key is None else key,
        codes,
        scales.view(torch.int16),
        left,
        n,
        LEVELS=levels,
        OWED=owed is not None,
        RANDOM=key is not None,
        FEEDBACK=feedback,
        ROWS=ROWS,
        BLOCK=BLOCK,
        num_warps=WARPS,
        enable_fp_fusion=False,
    )
    return codes, scales, left


@triton.jit
def decode_sum_kernel(
    codes,  # (K, n) int8
    scales,  # (K, n64) int16: bfloat16 by its bits
    weights,  # (K,) float32
    out,  # (n,) float32
    K,
    n,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    at = rows[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    total = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    for k in range(0, K):
        weight = tl.load(weights + k)
        # not a product with zero, which NaN survives
        end = tl.where(weight != 0, n, 0)
        short = tl.load(scales + rows, mask=rows * BLOCK < end, other=0).to(tl.int32)
        factor = (short << 16).to(tl.float32, bitcast=True) * weight
        code = tl.load(codes + at, mask=at < end, other=0)
        total += code.to(tl.float32) * factor[:, None]
        codes += n
        scales += tl.cdiv(n, BLOCK)
    tl.store(out + at, total, mask=at < n)


def decode_sum(codes: Tensor, scales: Tensor, weights: Tensor) -> Tensor:
    """sum_k w_k scale_k code_k (n,) in float32; see `fedlora.ops.delta_codec`."""
    count, n = codes.shape
    out = torch.empty(n, dtype=torch.float32, device=codes.device)
    decode_sum_kernel[(triton.cdiv(n, BLOCK * ROWS),)](
        codes.contiguous(),
        scales.contiguous().view(torch.int16),
        weights,
        out,
        count,
        n,
        ROWS=ROWS,
        BLOCK=BLOCK,
        num_warps=WARPS,
        enable_fp_fusion=False,
    )
    return out


_TILE = {"ROWS": ROWS, "BLOCK": BLOCK}
AOT = (
    *(
        AotCase(
            encode_kernel,
            {
                **dict.fromkeys(("delta", "owed", "left"), "*fp32"),
                **{"key": "*i64", "codes": "*i8", "scales": "*i16", "n": "i64"},
            },
            {
                "LEVELS": levels,
                **{"OWED": feedback, "RANDOM": random, "FEEDBACK": feedback},
                **_TILE,
            },
            WARPS,
            fused=False,
        )
        for levels, feedback, random in ((127, True, True), (127, False, False), (7, True, False))
    ),
    AotCase(
        decode_sum_kernel,
        {
            **{"codes": "*i8", "scales": "*i16", "weights": "*fp32", "out": "*fp32"},
            **{"K": "i32", "n": "i64"},
        },
        _TILE,
        WARPS,
        fused=False,
    ),
)
