"""Inputs of low-rank ops, and the slow obvious way to what they give, in float64."""

from dataclasses import dataclass

import torch

from fedlora.ops.dropout_mask import Dropout, keep_mask
from tests.kernels.close import seeded


def normal(*shape, seed, dtype=torch.float64, margin=0):
    """Random numbers; with a margin, in a buffer that has NaN beside every row."""
    values = torch.randn(*shape, generator=seeded(seed), dtype=torch.float64).to(dtype)
    if not margin:
        return values
    buffer = torch.full((*shape[:-1], shape[-1] + margin), float("nan"), dtype=dtype)
    buffer[..., : shape[-1]] = values
    return buffer[..., : shape[-1]]


@dataclass(frozen=True)
class Case:
    """Rows of groups, and widths, that an op must get right."""

    sizes: tuple[int, ...]
    inp: int
    out: int
    rank: int

    @property
    def rows(self):
        return sum(self.sizes)

    def keys(self):
        """A key of 63 bits for each group."""
        return torch.arange(1, len(self.sizes) + 1) * 1234567890123456789 % 2**62

    def dropout(self, rate):
        """With a key for each group, and examples of three tokens; None for a rate of zero."""
        return Dropout(rate, self.keys(), 3, 987654321) if rate else None


CASES = (
    # ragged, with a group of none and one of one, and nothing a multiple of anything
    Case((37, 0, 1, 70), 50, 43, 5),
    # a group of none at the end, and rank 1
    Case((3, 9, 0), 24, 17, 1),
    # one group, wider than a tile of ranks
    Case((45,), 70, 130, 67),
    # shapes that suit a GPU, and groups of one size
    Case((32, 32), 64, 96, 16),
)


def mask_of(dropout, rows, columns):
    """The mask of one client's rows, which are examples of `dropout.tokens` tokens."""
    at = torch.arange(rows)
    places = (at // dropout.tokens, at % dropout.tokens)
    return keep_mask(dropout.key.reshape(1), *places, columns, dropout)


def masked(x, case, dropout):
    """dropout(x) of the groups' rows, in float64, group by group."""
    if dropout is None:
        return x.double()
    parts = []
    for key, part in zip(dropout.key, x.split(case.sizes), strict=True):
        own = Dropout(dropout.rate, key, dropout.tokens, dropout.stream)
        kept = mask_of(own, len(part), x.shape[1])
        parts.append(part.double() * kept * dropout.upscale)
    return torch.cat(parts)


def plain(x, weight, bias, a, b, scale, mask=None):
    """y = x W^T + bias + scale (mask x) A^T B^T by autograd, everything by itself."""
    dropped = x if mask is None else x * mask
    y = x @ weight.T + scale * (dropped @ a.T) @ b.T
    return y if bias is None else y + bias
