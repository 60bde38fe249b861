"""Poisson sampling: every example is taken with the same probability, on its own.

The accountants assume just this. Batches of a fixed size, or an epoch's shuffle cut into
pieces, have another (and in general a worse) guarantee.
"""

import os
from collections.abc import Callable

import numpy as np

from fedlora.seeds import derive_seed

Uniform = Callable[[int], "np.ndarray[tuple[int], np.dtype[np.float64]]"]


def secret_uniform(count: int) -> "np.ndarray[tuple[int], np.dtype[np.float64]]":
    """Uniform numbers in [0, 1), (count,), from a generator with 256 fresh secret bits."""
    seed = int.from_bytes(os.urandom(32), "big")
    return np.random.Generator(np.random.PCG64DXSM(seed)).random(count)


def seeded_uniform(seed: int, *names: str | int) -> Uniform:
    """Uniform numbers that anybody who knows the seed can draw again: for tests only."""
    drawn = 0

    def draw(count: int) -> "np.ndarray[tuple[int], np.dtype[np.float64]]":
        nonlocal drawn
        drawn += 1
        stream = derive_seed(seed, "poisson", *names, drawn)
        return np.random.Generator(np.random.PCG64DXSM(stream)).random(count)

    return draw


def poisson_sample(count: int, rate: float, uniform: Uniform) -> list[int]:
    """The numbers below `count` that are taken, each with probability `rate`; may be none."""
    taken: list[int] = np.flatnonzero(uniform(count) < rate).tolist()
    return taken
