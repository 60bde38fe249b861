"""Sources of Gaussian noise for differential privacy.

    os       the device's fast generator, with a new seed from the operating system each draw
    secure   AES-256-CTR through the inverse normal distribution function
    test     drawn from a known seed: NOT PRIVATE

A generator whose seed can be guessed makes the noise removable. torch's CPU generator keeps
32 bits of its seed, which are quickly searched, so that "os" draws by numpy there.

Noise is drawn anew, from a new seed or key, at each call: a source holds no state that a
forked or restored process could repeat.
"""

import math
import secrets
from collections.abc import Sequence
from typing import Literal, Protocol

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from torch import Tensor

from fedlora.seeds import generator

NoiseMode = Literal["os", "secure", "test"]
# uniforms per pass, so that a large tensor is not held as raw bytes as a whole
BLOCK = 1 << 20


class NoiseSource(Protocol):
    """Where noise comes from.

    Attributes:
        mode: as in `privacy.noise`.
    """

    mode: NoiseMode

    def normal(self, shape: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
        """Independent standard normal values, float64, of this shape; new ones at each call."""
        ...


class OsNoise:
    """The device's fast generator, seeded anew by the operating system for each draw."""

    mode: NoiseMode = "os"

    def normal(self, shape: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
        """See `NoiseSource.normal`."""
        device = torch.device(device)
        if device.type == "cpu":
            draws = np.random.default_rng(secrets.randbits(128)).standard_normal(tuple(shape))
            return torch.from_numpy(np.asarray(draws))
        stream = torch.Generator(device).manual_seed(secrets.randbits(64) - (1 << 63))
        return torch.randn(tuple(shape), generator=stream, dtype=torch.float64, device=device)


class SecureNoise:
    """AES-256-CTR with a new key for each draw, through the inverse normal CDF.

    Each value is the sum of four such normals over 2, so that the gaps between the floating
    point numbers that one alone can take do not show (Holohan & Braghin, "Secure Random
    Sampling in Differential Privacy", https://arxiv.org/abs/2107.10138, section 5.1).
    """

    mode: NoiseMode = "secure"

    def normal(self, shape: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
        """See `NoiseSource.normal`."""
        cipher = Cipher(algorithms.AES(secrets.token_bytes(32)), modes.CTR(bytes(16)))
        stream = cipher.encryptor()
        count = math.prod(shape)
        values = torch.zeros(count, dtype=torch.float64)
        for first in range(0, count, BLOCK):
            block = values[first : first + BLOCK]
            for _ in range(4):
                block += normal_of_bits(stream.update(bytes(8 * len(block)))) / 2.0
        return values.reshape(tuple(shape)).to(device)


class TestNoise:
    """Noise that everybody who knows the seed can subtract: for tests and replays only.

    The same values on every device.

    Args:
        seed: `run.seed`.
        names: of the stream, see `fedlora.seeds`; a source with the same names begins anew.
    """

    mode: NoiseMode = "test"
    __test__ = False

    def __init__(self, seed: int, *names: str | int) -> None:
        self._stream = generator(seed, "noise", *names)

    def normal(self, shape: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
        """See `NoiseSource.normal`."""
        return torch.randn(tuple(shape), generator=self._stream, dtype=torch.float64).to(device)


def noise_source(mode: NoiseMode, seed: int, *names: str | int) -> NoiseSource:
    """The source of a mode.

    Args:
        seed, names: of the stream of "test"; "os" and "secure" ignore them.
    """
    if mode == "test":
        return TestNoise(seed, *names)
    return OsNoise() if mode == "os" else SecureNoise()


def normal_of_bits(bits: bytes) -> Tensor:
    """Standard normals (n,), float64, from 8 n uniform bytes: 53 of each 64 bits are used.

    One bit is the sign and 52 are a uniform in (0, 1/2), the lower tail, where floating
    point is dense: the values are symmetric, finite, and reach 8.3 on either side.
    """
    words = torch.frombuffer(bytearray(bits), dtype=torch.int64)
    half = ((words & ((1 << 52) - 1)).double() + 0.5) * 2.0**-53
    lower = torch.special.ndtri(half)
    return torch.where(words < 0, lower, -lower)
