"""Low-rank algebra: products L Q are handled by their factors, never as a d x k matrix."""

from collections.abc import Sequence

import torch
from torch import Tensor


def product_norm(left: Tensor, right: Tensor) -> float:
    """Frobenius norm of left @ right, in float64.

    Computed as ||R_L R_Q^T|| from two economy QR decompositions, so that a product that
    cancels to nothing comes out as nothing (a Gram matrix would leave half the digits).

    Args:
        left: (d, R).
        right: (R, k).
    """
    r_left = torch.linalg.qr(left.double(), mode="r").R  # (min(d, R), R)
    r_right = torch.linalg.qr(right.double().T, mode="r").R  # (min(k, R), R)
    return float(torch.linalg.matrix_norm(r_left @ r_right.T))


def stack(
    pairs: Sequence[tuple[Tensor, Tensor]], weights: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """(L (d, R), Q (R, k)) with L Q = sum_i weights_i L_i Q_i and R = sum of the ranks."""
    left = torch.cat([w * p[0].double() for p, w in zip(pairs, weights, strict=True)], dim=1)
    right = torch.cat([p[1].double() for p in pairs], dim=0)
    return left, right
