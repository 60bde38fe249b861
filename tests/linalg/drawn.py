"""Products of every kind, drawn by Hypothesis, and their dense float64 reference."""

import torch
from hypothesis import strategies as st

SPLITS = st.sampled_from(["left", "balanced"])
SIZES = st.integers(1, 12)
STACKED = st.integers(0, 14)
RANKS = st.integers(1, 4)
KINDS = st.sampled_from(["plain", "twins", "cancel", "graded", "gauge", "tiny", "zero", "float32"])
SEEDS = st.integers(0, 10**6)


def randn(*shape, draws):
    return torch.randn(*shape, generator=draws, dtype=torch.float64)


def generator(seed):
    return torch.Generator().manual_seed(seed)


def dense(pair):
    return pair[0].double() @ pair[1].double()


def scale_of(left, right):
    """What the rounding of a product is relative to: the norms of its rank-one terms."""
    return float((left.double().norm(dim=0) * right.double().norm(dim=1)).norm()) + 1e-300


@st.composite
def pairs(draw, d=SIZES, rank=STACKED, k=SIZES):
    """Plain, rank-deficient, cancelling, graded over 24 decades, unequally scaled, zero."""
    d, rank, k = draw(d), draw(rank), draw(k)
    draws = generator(draw(SEEDS))
    left, right = randn(d, rank, draws=draws), randn(rank, k, draws=draws)
    kind = draw(KINDS)
    if kind == "twins":
        return torch.cat([left / 3] * 3, dim=1), torch.cat([right] * 3)
    if kind == "cancel":
        return torch.cat([left, -left], dim=1), torch.cat([right, right])
    decades = 10.0 ** (-24 * torch.rand(rank, generator=draws, dtype=torch.float64))
    if kind == "graded":
        return left * decades.sqrt(), right * decades.sqrt()[:, None]
    if kind == "gauge":
        return left * decades.sqrt(), right / decades.sqrt()[:, None]
    if kind == "tiny":
        return left * 1e-12, right
    if kind == "zero":
        return left * 0.0, right
    if kind == "float32":
        return left.float(), right.float()
    return left, right


@st.composite
def clients(draw, ranks=RANKS):
    """(factors, weights that sum to 1) of 2 to 5 clients of one layer."""
    draws = generator(draw(SEEDS))
    d, k, n = draw(st.integers(6, 16)), draw(st.integers(6, 16)), draw(st.integers(2, 5))
    factors = [
        (randn(d, r, draws=draws), randn(r, k, draws=draws))
        for r in (draw(ranks) for _ in range(n))
    ]
    weights = torch.rand(n, generator=draws, dtype=torch.float64) + 0.1
    return factors, (weights / weights.sum()).tolist()
