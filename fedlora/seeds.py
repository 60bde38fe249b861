"""One seed derives every random stream, by name.

A stream is identified by words, never by how many numbers were drawn before, so that
client order, restarts and engines change no bit. Generators live on the CPU: CPU and
CUDA generators give different numbers for the same seed.
"""

import hashlib

import torch


def derive_seed(seed: int, *names: str | int) -> int:
    """A 63-bit seed for the stream called `names` of the run with `seed`."""
    text = "\x1f".join([str(seed), *map(str, names)]).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big") >> 1


def generator(seed: int, *names: str | int) -> torch.Generator:
    """A fresh CPU generator for the stream called `names`."""
    return torch.Generator("cpu").manual_seed(derive_seed(seed, *names))
