"""Leading singular triplets of a weight, with canonical signs."""

import torch
from torch import Tensor

# a full decomposition takes about a second here, and minutes at the width of a 7B model
EXACT_UP_TO = 1024
OVERSAMPLING = 10
ITERATIONS = 10


def truncated_svd(
    weight: Tensor, rank: int, draws: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """U (d, r), sigma (r,) and V^T (r, k) of `weight` (d, k), float32 (float64 for float64).

    Exact up to min(d, k) = `EXACT_UP_TO`, randomised above. Signs are canonical.

    Args:
        rank: r, at most min(d, k).
        draws: used by the randomised decomposition only.
    """
    weight = weight if weight.dtype == torch.float64 else weight.float()
    if min(weight.shape) > EXACT_UP_TO:
        u, sigma, vh = randomised_svd(weight, rank, draws)
    else:
        u, sigma, vh = torch.linalg.svd(weight, full_matrices=False)
    u, vh = canonical_signs(u[:, :rank], vh[:rank])
    return u, sigma[:rank], vh


def randomised_svd(
    weight: Tensor, rank: int, draws: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """U (d, l), sigma (l,) and V^T (l, k), l = min(rank + 10, d, k); U^T `weight` = sigma V^T.

    Halko, Martinsson & Tropp, "Finding Structure with Randomness", algorithms 4.4 (subspace
    iteration, 10 rounds) and 5.1, https://arxiv.org/abs/0909.4061. U and V are orthonormal
    whatever the spectrum; directions whose singular values are close are found less exactly.
    """
    width = min(rank + OVERSAMPLING, *weight.shape)
    # torch.svd_lowrank would draw from the global generator
    start = torch.randn(weight.shape[1], width, generator=draws, dtype=torch.float32)
    q = torch.linalg.qr(weight @ start.to(weight)).Q  # (d, l)
    for _ in range(ITERATIONS):
        q = torch.linalg.qr(weight.T @ q).Q  # (k, l)
        q = torch.linalg.qr(weight @ q).Q  # (d, l)
    u, sigma, vh = torch.linalg.svd(q.T @ weight, full_matrices=False)
    return q @ u, sigma, vh


def canonical_signs(u: Tensor, vh: Tensor) -> tuple[Tensor, Tensor]:
    """U (d, r), V^T (r, k) with the entry of largest magnitude in each column of U positive."""
    peaks = u.gather(0, u.abs().argmax(0, keepdim=True))  # (1, r)
    signs = torch.where(peaks < 0, -1.0, 1.0).to(u)
    return signs * u, signs.T * vh
