"""Dropout masks that can be made again instead of kept.

Whether an entry survives depends on a key, on the example, the token and the column it is in,
and on a stream, through the counter-based generator Philox4x32 of Salmon et al., "Parallel
Random Numbers: As Easy as 1, 2, 3", https://doi.org/10.1145/2063384.2063405, section 3.3; with 7
rounds, the fewest that pass all their tests (table 2). One draw of 128 bits serves eight columns
with 16 bits each, so that rates are multiples of 2**-16.

As example and token count apart, padding changes no mask.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

COLUMNS = 8
LEVELS = 2**16
WORD = 0xFFFFFFFF
ROUNDS = 7
# rate, tokens and stream of a `Dropout`
Settings = tuple[float, int, int]
NO_DROPOUT: Settings = (0.0, 1, 0)


@dataclass(frozen=True)
class Dropout:
    """Inverted dropout of an op's input, before its low-rank part.

    Attributes:
        rate: probability that an entry is dropped, from 0 to less than 1; what is done is its
            nearest multiple of 2**-16, and what survives is scaled by the rate of just that.
        key: int64, of shape (), or (K,) for K clients: a client's mask is that of its key,
            with its examples numbered from 0, whoever else is in the batch.
        tokens: rows of one example, which stand below one another.
        stream: from 0 to below 2**31; other streams of a key have other masks.
        kept: the mask (M, k) of all rows, if it is drawn already.
    """

    rate: float
    key: Tensor
    tokens: int = 1
    stream: int = 0
    kept: Tensor | None = None

    def __post_init__(self) -> None:
        assert self.key.dtype == torch.int64
        assert 0 <= threshold(self.rate) < LEVELS, f"dropout rate {self.rate}"
        assert self.tokens > 0
        assert 0 <= self.stream < 2**31

    @property
    def upscale(self) -> float:
        """What entries that survive are multiplied by."""
        return LEVELS / (LEVELS - threshold(self.rate))

    @property
    def settings(self) -> Settings:
        """Everything of it that is no tensor: rate, tokens and stream."""
        return self.rate, self.tokens, self.stream

    def drawn(self, clients: Tensor, rows: Tensor, columns: int) -> "Dropout":
        """The same with its mask, unless it has it.

        Args:
            clients: which key each row has, int64 (M,).
            rows: each row's number within its client, int64 (M,).
            columns: k.
        """
        if self.kept is not None:
            return self
        keys = self.key.reshape(-1)
        key = keys if len(keys) == 1 else keys[clients]
        kept = keep_mask(key, rows // self.tokens, rows % self.tokens, columns, self)
        return replace(self, kept=kept)


def threshold(rate: float) -> int:
    """Of the 2**16 equally likely draws of an entry, how many drop it."""
    return round(rate * LEVELS)


def keep_mask(
    keys: Tensor, examples: Tensor, tokens: Tensor, columns: int, dropout: Dropout
) -> Tensor:
    """Which entries survive, (M, columns) bool.

    Args:
        keys: key of every row, int64, (M,) or (1,).
        examples, tokens: where every row is, int64, (M,).
        columns: how many there are.
        dropout: gives rate and stream.
    """
    groups = torch.arange(-(-columns // COLUMNS), device=examples.device)
    stream = torch.full_like(groups[:1], dropout.stream)
    words = philox(keys[:, None], (groups, tokens[:, None], examples[:, None], stream))
    least = threshold(dropout.rate)
    draws = [half >= least for word in words for half in (word & (LEVELS - 1), word >> 16)]
    return torch.stack(draws, -1).flatten(1)[:, :columns]


def philox(key: Tensor, counter: Sequence[Tensor]) -> list[Tensor]:
    """Four words of 32 bits, held in int64, of keys of 64 bits and counters of four words.

    Shapes are broadcast, and only as late as they must be: the first rounds of counters that
    depend on a row or a column alone are few.
    """
    k0, k1 = key & WORD, (key >> 32) & WORD
    c0, c1, c2, c3 = counter
    for _ in range(ROUNDS):
        # products wrap round at 2**64, which changes no bit of either half
        even, odd = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1 = _xor(_high(odd), c1, k0), odd.bitwise_and_(WORD)
        c2, c3 = _xor(_high(even), c3, k1), even.bitwise_and_(WORD)
        k0, k1 = (k0 + 0x9E3779B9) & WORD, (k1 + 0xBB67AE85) & WORD
    return list(torch.broadcast_tensors(c0, c1, c2, c3))


def _high(product: Tensor) -> Tensor:
    return (product >> 32).bitwise_and_(WORD)


def _xor(fresh: Tensor, *others: Tensor) -> Tensor:
    for other in others:
        size = torch.broadcast_shapes(fresh.shape, other.shape)
        fresh = fresh.bitwise_xor_(other) if size == fresh.shape else fresh ^ other
    return fresh
