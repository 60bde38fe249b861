"""Dropout masks that are made again instead of kept.

Whether an entry survives depends on a key, on the number of its row and on its column, through
the counter-based generator Philox4x32-10 of Salmon et al., "Parallel Random Numbers: As Easy as
1, 2, 3", https://doi.org/10.1145/2063384.2063405, section 3.3. One draw of 128 bits serves eight
columns with 16 bits each, so that rates are multiples of 2**-16.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

COLUMNS = 8
LEVELS = 2**16
WORD = 0xFFFFFFFF
ROUNDS = 10


@dataclass(frozen=True)
class Dropout:
    """Inverted dropout of an op's input, before its low-rank part.

    Attributes:
        rate: probability that an entry is dropped, from 0 to less than 1; what is done is its
            nearest multiple of 2**-16, and what survives is scaled by the rate of just that.
        key: int64, of shape (), or (K,) for K clients: a client's mask is that of its key,
            with its rows numbered from 0, whoever else is in the batch.
    """

    rate: float
    key: Tensor

    def __post_init__(self) -> None:
        assert self.key.dtype == torch.int64
        assert 0 <= threshold(self.rate) < LEVELS, f"dropout rate {self.rate}"


def threshold(rate: float) -> int:
    """Of the 2**16 equally likely draws of an entry, how many drop it."""
    return round(rate * LEVELS)


def upscale(rate: float) -> float:
    """What entries that survive are multiplied by."""
    return LEVELS / (LEVELS - threshold(rate))


def keep_mask(keys: Tensor, rows: Tensor, columns: int, rate: float) -> Tensor:
    """Which entries survive, (M, columns) bool.

    Args:
        keys: key of every row, int64, (M,) or ().
        rows: number of every row, int64, (M,).
        columns: how many there are.
        rate: see `Dropout`.
    """
    groups = torch.arange(-(-columns // COLUMNS), device=rows.device)
    zero = torch.zeros_like(rows[:, None])
    words = torch.stack(philox(keys[..., None], [groups, rows[:, None], zero, zero]), -1)
    draws = torch.stack([words & (LEVELS - 1), words >> 16], -1).flatten(1)
    return draws[:, :columns] >= threshold(rate)


def philox(key: Tensor, counter: Sequence[Tensor]) -> list[Tensor]:
    """Four words of 32 bits, held in int64, of a key of 64 bits and a counter of four words."""
    k0, k1 = key & WORD, (key >> 32) & WORD
    c0, c1, c2, c3 = torch.broadcast_tensors(*(word & WORD for word in counter))
    for _ in range(ROUNDS):
        # products wrap round at 2**64, which changes no bit of either half
        even, odd = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1 = ((odd >> 32) & WORD) ^ c1 ^ k0, odd & WORD
        c2, c3 = ((even >> 32) & WORD) ^ c3 ^ k1, even & WORD
        k0, k1 = (k0 + 0x9E3779B9) & WORD, (k1 + 0xBB67AE85) & WORD
    return [c0, c1, c2, c3]
