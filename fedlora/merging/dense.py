"""What methods on single entries of the weight change need: blocks of rows, and a way back.

TIES and DARE act on entries of dW, which do not commute with the factors, so here a layer's
(d, k) is formed, one layer at a time.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from fedlora.linalg import Pair, truncate

ROWS = 256
"""Rows of one block."""

_DIGIT = 1 << 16


def row_blocks(changes: Iterable[Pair]) -> Iterator[list[Tensor]]:
    """The same rows of every change, block after block: each (at most ROWS, k)."""
    changes = list(changes)
    for start in range(0, changes[0][0].shape[0], ROWS):
        yield [left[start : start + ROWS] @ right for left, right in changes]


def magnitude_threshold(changes: Iterable[Pair], fraction: float) -> Tensor:
    """The magnitude that the `fraction` largest entries of all changes together reach.

    A float32 scalar; magnitudes are compared in float32. Found by radix selection on their
    bits, which are in the order of the numbers: two passes, and no more memory than a block.

    Args:
        changes: all layers of one adapter.
        fraction: above 0, at most 1.
    """
    changes = list(changes)
    total = sum(left.shape[0] * right.shape[1] for left, right in changes)
    wanted = max(1, round(fraction * total))
    prefix = 0
    for step in (_DIGIT, 1):
        counts = torch.zeros(_DIGIT, dtype=torch.int64)
        for change in changes:
            for (block,) in row_blocks([change]):
                bits = block.float().abs().view(torch.int32).flatten()
                if step == 1:
                    bits = bits[bits // _DIGIT == prefix] % _DIGIT
                else:
                    bits = bits // _DIGIT
                counts += torch.bincount(bits, minlength=_DIGIT)
        # entries whose digit is at least the index; the last index that leaves enough
        reached = counts.flip(0).cumsum(0).flip(0)
        digit = int((reached >= wanted).sum()) - 1
        wanted -= int(reached[digit + 1]) if digit + 1 < _DIGIT else 0
        prefix = digit if step == _DIGIT else prefix * _DIGIT + digit
    return torch.tensor(prefix, dtype=torch.int32).view(torch.float32)


def to_lora(change: Tensor, rank: int | None) -> Pair:
    """(B (d, r), A (r, k)) of a dense change (d, k): its truncated SVD, balanced.

    Args:
        rank: r; None keeps every singular value above 1e-7 of the largest, at least one.
    """
    if rank is not None:
        # the leading subspace from the smaller Gram, in a quarter of the time of an SVD; squared
        # singular values lose digits of the small ones only, which matter least in the product
        wide = change.shape[0] < change.shape[1]
        tall = change.T if wide else change
        vectors = torch.linalg.eigh(tall.T @ tall).eigenvectors[:, -rank:]  # (min(d, k), r)
        pair = (vectors, vectors.T @ change) if wide else (change @ vectors, vectors.T)
        b, a, _ = truncate(*pair, rank, split="balanced")
        return b, a
    u, sigma, vh = torch.linalg.svd(change, full_matrices=False)
    kept = max(1, int((sigma > 1e-7 * sigma[0]).sum()))
    root = sigma[:kept].sqrt()
    return u[:, :kept] * root, root[:, None] * vh[:kept]
