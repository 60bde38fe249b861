"""A delta as integers of few bits, with a scale for each block, and what coding took from it.

A block of 64 entries has one scale, max |x| / levels in bfloat16, and integers from -levels to
levels. They are rounded to the nearest; or up or down at random with the expected value of the
entry (Alistarh et al., "QSGD", https://arxiv.org/abs/1610.02132, section 3.1), where nothing is
kept of the error. What is owed from earlier is added first, and what coding took is given back:
error feedback, see `fedlora.client.feedback`.

Neither clipping nor the noise of differential privacy is done here: a client is clipped as a
whole, and noise must come from a source that cannot be guessed.

Shapes: n entries, m = ceil(n / 64) blocks.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from fedlora.ops.dropout_mask import philox
from fedlora.ops.registry import uses_triton

BLOCK = 64
# below it, a scale would have fewer than 8 significant bits
LEAST_SCALE = 2.0**-126

_LIBRARY = torch.library.Library("fedlora", "FRAGMENT")
_LIBRARY.define(
    "delta_encode(Tensor delta, Tensor? owed, Tensor? key, int levels) -> (Tensor, Tensor, Tensor)"
)


@dataclass(frozen=True)
class Coded:
    """A coded delta.

    Attributes:
        codes: int8 (n,).
        scales: bfloat16 (m,), not negative. One of a block that holds something infinite or NaN
            is so itself, and its codes are 0.
        owed: what coding took, (n,) as the delta; (0,) if nothing was owed before.
    """

    codes: Tensor
    scales: Tensor
    owed: Tensor


def encode(
    delta: Tensor, levels: int, owed: Tensor | None = None, key: Tensor | None = None
) -> Coded:
    """Codes of `delta`, or of `delta` with what is owed.

    Args:
        delta: (n,) float32, or float64 on a processor.
        levels: 127 or 7, say; at most 127.
        owed: (n,), of the same format.
        key: int64, of shape (): rounds at random; the same key and place give the same draw.
    """
    assert 0 < levels <= 127
    return Coded(*torch.ops.fedlora.delta_encode(delta, owed, key, levels))


def decode(codes: Tensor, scales: Tensor) -> Tensor:
    """The entries that `codes` (n,) and `scales` (m,) mean, (n,) float32: exact.

    A product of 8 bits and 8 significant ones needs no rounding.
    """
    return codes.float() * scales.float().repeat_interleave(BLOCK)[: codes.numel()]


def _encode(
    delta: Tensor, owed: Tensor | None, key: Tensor | None, levels: int
) -> tuple[Tensor, Tensor, Tensor]:
    if uses_triton(delta) and delta.dtype == torch.float32:
        from fedlora.ops.kernels.delta_codec import encode as kernel

        return kernel(delta, owed, key, levels)
    values = delta if owed is None else delta + owed
    n = values.numel()
    blocks = pad(values, (0, -n % BLOCK)).view(-1, BLOCK)
    wanted = (blocks.abs().amax(1) if n else blocks.new_empty(0)) / levels
    # to the nearest, max / scale still rounds to `levels`, or exceeds it by less than 1/2; at
    # random it must not exceed it at all
    scales = wanted.to(torch.bfloat16) if key is None else _rounded_up(wanted.float())
    scales[scales.float() < LEAST_SCALE] = 0.0
    wide = scales.to(values.dtype)[:, None]
    steps = blocks / wide
    codes = steps.round() if key is None else (steps + draws(key, n).view_as(steps)).floor()
    codes = torch.where(wide == 0, 0.0, torch.nan_to_num(codes.clamp(-levels, levels), 0.0))
    left = (blocks - codes * wide).view(-1)[:n] if owed is not None else values.new_empty(0)
    return codes.view(-1)[:n].to(torch.int8), scales, left.clone()


def draws(key: Tensor, n: int) -> Tensor:
    """Multiples of 2**-24 in [0, 1) of n entries, and of those that fill up the last block."""
    places = torch.arange(-(-n // BLOCK) * BLOCK // 4, device=key.device)
    zero = torch.zeros_like(places[:1])
    words = torch.stack(philox(key.reshape(1), (places, zero, zero, zero)), 1)
    return (words >> 8).flatten().float() * 2.0**-24


def _rounded_up(x: Tensor) -> Tensor:
    """The smallest bfloat16 that is not below `x` (float32, not negative); NaN stays NaN."""
    bits = (x.view(torch.int32) + 0xFFFF) & ~0xFFFF
    return torch.where(x.isfinite(), bits.view(torch.float32), x).to(torch.bfloat16)


def _fake(
    delta: Tensor, owed: Tensor | None, key: Tensor | None, levels: int
) -> tuple[Tensor, Tensor, Tensor]:
    n = delta.shape[0]
    return (
        delta.new_empty(n, dtype=torch.int8),
        delta.new_empty((n + BLOCK - 1) // BLOCK, dtype=torch.bfloat16),
        delta.new_empty(n if owed is not None else 0),
    )


_LIBRARY.impl("delta_encode", _encode, "CompositeExplicitAutograd")
torch.library.register_fake("fedlora::delta_encode", _fake, lib=_LIBRARY)
