"""The arithmetic of int8 and int4 coding: blocks of 64 numbers with one scale, and back.

Rounded to nearest, a block's scale is max |x| / levels, itself rounded to bfloat16, and its codes
are the nearest multiples of it; what coding takes is handed back for error feedback, Karimireddy
et al., "Error Feedback Fixes SignSGD and other Gradient Compression Schemes",
https://arxiv.org/abs/1901.09847, algorithm 1. Rounded at random, as in Alistarh et al., "QSGD",
https://arxiv.org/abs/1610.02132, section 3.1, a code is one of the two multiples next to x and x
in expectation, to 2**-23 of the scale; the scale is then rounded up, so that no x is beyond the
last multiple. The draw of an entry is a function of a key and of its position alone.

Neither clipping nor the noise of differential privacy belongs here. A client clips its whole
update, of many tensors, before it is coded. The noise must come from the operating system's or
a cryptographic generator, and Philox is neither: who knows a few draws knows them all.

Shapes: n entries, n64 = ceil(n / 64) blocks, K clients.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from fedlora.ops.dropout_mask import philox
from fedlora.ops.registry import uses_triton

BLOCK = 64
WORDS = 4  # of one draw, for as many entries
# below it, a scale would have fewer than 8 significant bits
LEAST_SCALE = 2.0**-126


def encode(
    delta: Tensor, levels: int, owed: Tensor | None = None, key: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes x = delta + owed, and says what that takes from it.

    A block with an entry that is not finite has a scale that is not, codes 0, and owes NaN.
    Rounded to nearest, what was decoded is coded as before.

    Args:
        delta: (n,) float32.
        levels: largest code: 127 for 8 bits, 7 for 4.
        owed: what earlier calls took, (n,) float32; None for nothing.
        key: int64, of shape (): rounds at random; None rounds to nearest, ties to even.

    Returns:
        codes (n,) int8 from -levels to levels, scales (n64,) bfloat16, and x minus what is
        decoded, (n,) float32.
    """
    codes, scales, left = _encode(delta, levels, owed, key, True)
    return codes, scales, left


def quantise(delta: Tensor, levels: int, key: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The codes and scales of `encode`, where nobody asks what is owed."""
    codes, scales, _ = _encode(delta, levels, None, key, False)
    return codes, scales


def decode_sum(codes: Tensor, scales: Tensor, weights: Tensor) -> Tensor:
    """sum_k w_k scale_k code_k, added from the first client to the last.

    Every term is (w scale) code. What has weight 0 is not read, whatever it holds.

    Args:
        codes: (K, n) int8.
        scales: (K, n64) bfloat16.
        weights: (K,) float32 or float64.

    Returns:
        (n,) of the weights' format.
    """
    total: Tensor = _decode_sum(codes, scales, weights)
    return total


def decode(codes: Tensor, scales: Tensor) -> Tensor:
    """What one client's codes stand for, (n,) float32: scale code, which is exact.

    Args:
        codes: (n,) int8.
        scales: (n64,) bfloat16.
    """
    return decode_sum(codes[None], scales[None], torch.ones(1, device=codes.device))


@torch.library.custom_op("fedlora::delta_encode", mutates_args=())
def _encode(
    delta: Tensor, levels: int, owed: Tensor | None, key: Tensor | None, feedback: bool
) -> tuple[Tensor, Tensor, Tensor]:
    assert delta.dtype == torch.float32
    if uses_triton(delta):
        from fedlora.ops.kernels.delta_codec import encode as kernel

        return kernel(delta, levels, owed, key, feedback)
    x = delta if owed is None else delta + owed
    blocks = pad(x, (0, -x.numel() % BLOCK)).reshape(-1, BLOCK)
    largest = blocks.abs().amax(1)
    if key is None:
        # max / scale still rounds to `levels`, or exceeds it by less than 1/2
        scales = (largest / levels).to(torch.bfloat16)
        scales[scales.float() < LEAST_SCALE] = 0.0
    else:
        scales = _rounded_up(largest / levels)
        scales[(largest > 0) & (scales.float() < LEAST_SCALE)] = LEAST_SCALE
    wide = scales.float()[:, None]
    steps = blocks / wide
    steps = steps.round() if key is None else _rounded_at_random(steps, key)
    kept = torch.where(wide == 0, 0.0, torch.nan_to_num(steps.clamp(-levels, levels), 0.0))
    codes = kept.flatten()[: x.numel()].to(torch.int8)
    if not feedback:
        return codes, scales, delta.new_empty(0)
    return codes, scales, x - (kept * wide).flatten()[: x.numel()]


@_encode.register_fake
def _(
    delta: Tensor, levels: int, owed: Tensor | None, key: Tensor | None, feedback: bool
) -> tuple[Tensor, Tensor, Tensor]:
    blocks = (delta.numel() + BLOCK - 1) // BLOCK
    return (
        delta.new_empty(delta.numel(), dtype=torch.int8),
        delta.new_empty(blocks, dtype=torch.bfloat16),
        delta.new_empty(delta.numel() if feedback else 0),
    )


@torch.library.custom_op("fedlora::delta_decode_sum", mutates_args=())
def _decode_sum(codes: Tensor, scales: Tensor, weights: Tensor) -> Tensor:
    if uses_triton(codes) and weights.dtype == torch.float32:
        from fedlora.ops.kernels.delta_codec import decode_sum as kernel

        return kernel(codes, scales, weights)
    n = codes.shape[1]
    total = weights.new_zeros(n)
    for k in weights.nonzero().flatten().tolist():
        factors = (scales[k].to(weights.dtype) * weights[k]).repeat_interleave(BLOCK)[:n]
        total += factors.mul_(codes[k])
    return total


@_decode_sum.register_fake
def _(codes: Tensor, scales: Tensor, weights: Tensor) -> Tensor:
    return weights.new_empty(codes.shape[1])


def _rounded_up(scales: Tensor) -> Tensor:
    """The least bfloat16 numbers that are no smaller; of non-negative float32."""
    cut = scales.view(torch.int32).bitwise_and(-(2**16)).view(torch.float32)
    above = ((scales.view(torch.int32) >> 16) + 1).to(torch.int16).view(torch.bfloat16)
    return torch.where(cut < scales, above, scales.to(torch.bfloat16))


def _rounded_at_random(steps: Tensor, key: Tensor) -> Tensor:
    """One of the two integers next to each of (n64, 64), by its position."""
    groups = torch.arange(steps.numel() // WORDS, device=steps.device)
    zero = torch.zeros_like(groups)
    words = torch.stack(philox(key, [groups, groups >> 32, zero, zero]), 1)
    draws = (words >> 8).float().reshape(steps.shape) * 2.0**-24
    # of the size, whose distance from the next integer is exact
    size = steps.abs()
    below = size.floor()
    return (below + (draws < size - below)).copysign(steps)
