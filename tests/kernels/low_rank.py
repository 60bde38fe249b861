"""Inputs of low-rank ops, and the slow obvious way to what they give, in float64."""

from dataclasses import dataclass

import torch

from fedlora.ops.dropout_mask import keep_mask, upscale
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


def masked(x, case, keys, rate):
    """dropout(x) of the groups' rows, in float64, group by group."""
    if keys is None:
        return x.double()
    parts = []
    for key, part in zip(keys, x.split(case.sizes), strict=True):
        kept = keep_mask(key, torch.arange(len(part)), x.shape[1], rate)
        parts.append(part.double() * kept * upscale(rate))
    return torch.cat(parts)


def plain(x, weight, bias, a, b, scale, mask=None):
    """y = x W^T + bias + scale (mask x) A^T B^T by autograd, everything by itself."""
    dropped = x if mask is None else x * mask
    y = x @ weight.T + scale * (dropped @ a.T) @ b.T
    return y if bias is None else y + bias
