"""Low-rank algebra: products L Q are handled by their factors, never as a d x k matrix.

A pair (L (d, R), Q (R, k)) stands for L Q. Everything is computed and returned in float64,
whatever comes in; the same input gives the same bits at the same number of threads.
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from fedlora.errors import StrategyError

Pair = tuple[Tensor, Tensor]

# rounding leaves singular values of about 1e-15 of the product's scale where exact
# arithmetic has zeros; their vectors point anywhere
_NOISE = 1e-13
# entries this close to the largest are tied: rounding must not choose the sign
_TIE = 1e-8


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


def stack(pairs: Sequence[Pair], weights: Sequence[float]) -> Pair:
    """(L (d, R), Q (R, k)) with L Q = sum_i weights_i L_i Q_i and R = sum of the ranks."""
    left = torch.cat([w * p[0].double() for p, w in zip(pairs, weights, strict=True)], dim=1)
    right = torch.cat([p[1].double() for p in pairs], dim=0)
    return left, right


def difference(pair: Pair, reference: Pair) -> Pair:
    """L_1 Q_1 - L_2 Q_2 as a stack, of rank at most R_1 + R_2."""
    return stack([pair, reference], [1.0, -1.0])


def inner(pair: Pair, other: Pair) -> float:
    """<L_1 Q_1, L_2 Q_2> = sum of (L_1^T L_2) * (Q_1 Q_2^T), entry by entry.

    Exact to rounding of the factors' norms: half the digits are left of a product that
    cancels; `product_norm` keeps them.
    """
    lefts = pair[0].double().T @ other[0].double()  # (R_1, R_2)
    rights = pair[1].double() @ other[1].double().T
    return float((lefts * rights).sum())


def gram_kernel(pairs: Sequence[Pair]) -> Tensor:
    """K (n, n) with K_ij = <L_i Q_i, L_j Q_j>, symmetric, from two Grams of the stacks.

    Squared distances are K_ii + K_jj - 2 K_ij; rounding can make them slightly negative.
    """
    left, right = stack(pairs, [1.0] * len(pairs))
    products = (left.T @ left) * (right @ right.T)  # (R, R)
    ranks = torch.tensor([p[1].shape[0] for p in pairs])
    owner = torch.repeat_interleave(torch.eye(len(pairs), dtype=torch.float64), ranks, dim=1)
    kernel = owner @ products @ owner.T  # (n, n): sums over blocks
    return (kernel + kernel.T) / 2


def project(left: Tensor, right: Tensor, rows: Tensor) -> Tensor:
    """L (Q rows^T) (d, r) for rows (r, k): the product seen from a row space."""
    return left.double() @ (right.double() @ rows.double().T)


def truncate(
    left: Tensor, right: Tensor, rank: int, *, split: Literal["left", "balanced"] = "left"
) -> tuple[Tensor, Tensor, Tensor]:
    """The best approximation of left @ right of rank `rank`, as (B (d, r), A (r, k), sigma).

    Two Householder QR decompositions and the SVD of the small core R_L R_Q^T = U S V^T; the
    orthogonal factors are applied, never formed. r is exactly `rank`; slots past the
    numerical rank of the product are zero in both factors (see `fill_dead`), for their
    singular vectors are rounding. So a product that is zero, or cancels to it, gives zeros.

    Every column of B has its largest entry positive; the first one where several tie.

    Args:
        left: (d, R).
        right: (R, k).
        rank: of the result, 0 or more; may exceed R, d and k.
        split: "left" gives B = U S and A = V^T, whose rows are orthonormal, as FlexLoRA
            (https://arxiv.org/abs/2402.11505) sends; "balanced" gives B = U sqrt(S),
            A = sqrt(S) V^T.

    Returns:
        B, A and all min(d, k, R) singular values of the product, descending.

    Raises:
        StrategyError: a factor is not finite, or `split` is neither.
    """
    if split not in ("left", "balanced"):
        raise StrategyError(f'split is "{split}"; expected "left" or "balanced"')
    u, sigma, vh = _svd(left, right, rank)
    found = u.shape[1]
    kept = sigma[:found]
    b = torch.zeros(left.shape[0], rank, dtype=torch.float64)
    a = torch.zeros(rank, right.shape[1], dtype=torch.float64)
    if split == "left":
        b[:, :found] = u * kept
        a[:found] = vh
    else:
        b[:, :found] = u * kept.sqrt()
        a[:found] = kept.sqrt()[:, None] * vh
    return b, a, sigma


def recompress(left: Tensor, right: Tensor, tol: float = 1e-7) -> Pair:
    """The same product with as few columns as its singular values above tol * sigma_1 need.

    The error is sqrt(sum of the dropped sigma^2). A product of zero gives rank 0.

    Raises:
        StrategyError: a factor is not finite.
    """
    u, sigma, vh = _svd(left, right, right.shape[0])
    sigma = sigma[: u.shape[1]]
    rank = int((sigma > tol * sigma[:1]).sum())
    return u[:, :rank] * sigma[:rank], vh[:rank].contiguous()


def fill_dead(b: Tensor, a: Tensor, generator: torch.Generator) -> Pair:
    """Give slots that are zero in both factors a row of A to learn with.

    A slot with b = 0 and a = 0 has zero gradients for ever. Its row of A becomes random,
    orthogonal to all other rows while r <= k, of norm 1/sqrt(3): the root mean square for
    the entries uniform in +-1/sqrt(k) that LoRA's code starts from
    (https://github.com/microsoft/LoRA). Its column of B stays zero, so the product is
    unchanged.

    Args:
        b: (d, r).
        a: (r, k).
        generator: drawn from only if a slot is dead.
    """
    r, k = a.shape
    dead = (b == 0).all(dim=0) & (a == 0).all(dim=1)  # (r,)
    count = int(dead.sum())
    if not count:
        return b, a
    rows = torch.randn(count, k, dtype=torch.float64, generator=generator)
    if r <= k:
        basis = torch.linalg.qr(torch.cat([a[~dead].double(), rows]).T).Q  # (k, r)
        rows = basis[:, r - count :].T
    rows = rows / (math.sqrt(3.0) * torch.linalg.vector_norm(rows, dim=1, keepdim=True))
    filled = a.clone()
    filled[dead] = rows.to(a.dtype)
    return b, filled


def _svd(left: Tensor, right: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """U (d, m), all singular values, V^T (m, k), m <= `most` without those that are noise."""
    # of the products of single columns and rows, so that (L M, M^-1 Q) with diagonal M,
    # however unequal, counts as L Q does: QR and SVD err by rounding of exactly this
    norms = torch.linalg.vector_norm(left, dim=0, dtype=torch.float64) * (
        torch.linalg.vector_norm(right, dim=1, dtype=torch.float64)
    )  # (R,)
    scale = float(torch.linalg.vector_norm(norms))
    if not math.isfinite(scale):
        raise StrategyError(
            f"a product of factors {tuple(left.shape)} and {tuple(right.shape)} is not finite; "
            "the factors must be finite to be decomposed"
        )
    left_qr, r_left = _householder(left)
    right_qr, r_right = _householder(right.T)
    u, sigma, vh = torch.linalg.svd(r_left @ r_right.T, full_matrices=False)
    found = min(most, int((sigma > _NOISE * scale).sum()))
    u = _rotate(left_qr, u[:, :found])
    v = _rotate(right_qr, vh[:found].T)
    size = u.abs()
    tied = size >= (1 - _TIE) * size.amax(dim=0)
    first = tied.to(torch.uint8).argmax(dim=0, keepdim=True)  # (1, m)
    sign = u.gather(0, first).sign()
    return u * sign, sigma, (v * sign).T


def _householder(matrix: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """(reflectors (m, s), tau (s,)) and R (s, n) of the QR of (m, n); s = min(m, n)."""
    packed, tau = torch.geqrf(matrix.double())
    size = tau.shape[0]
    return (packed[:, :size], tau), packed[:size].triu()


def _rotate(qr: tuple[Tensor, Tensor], inside: Tensor) -> Tensor:
    """Q @ inside, for the Q (d, s) of a QR: (s, m) -> (d, m), without forming Q."""
    reflectors, tau = qr
    out = torch.zeros(reflectors.shape[0], inside.shape[1], dtype=torch.float64)
    out[: inside.shape[0]] = inside
    return torch.ormqr(reflectors, tau, out)
