"""LoRA-LEGO: the rank-one units of several LoRAs, clustered and put together again.

Zhao et al., "Merging LoRAs like Playing LEGO: Pushing the Modularity of LoRA to Extremes
Through Rank-Wise Clustering", https://arxiv.org/abs/2409.16167: minimal semantic units,
rank-wise clustering, and the dual reweighting.

A LoRA of rank r is a set of r units: unit j is the point (a_j, b_j) in R^(k + d), with a_j a
row of A and b_j a column of B, and the weight change is the sum of b_j a_j^T. The units of
all LoRAs are pooled, k-means makes K clusters of them, and each centroid is a unit of the
merged LoRA. K-means needs inner products of units only, so it runs on their Gram matrix:
O(R^2 (d + k)) once for R units in all, then O(R^2 + R K) per iteration, whatever d and k.

Differs from the paper: units are balanced first (|a| = |b|, same product), for the split of
a unit's length between its halves says nothing of what it does; (-a, -b) counts as the unit
(a, b) that it is; and `mode="mass"` keeps the scale of the mean, which a merge that is
repeated every round needs.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

# a unit this much smaller than the largest carries no update, but would take up a cluster
_NEGLIGIBLE = 1e-8
# squared distances from a Gram matrix are known to this part of the squared norms
_SAME = 1e-12


@dataclass(frozen=True)
class Clustering:
    """A division of R points into at most K clusters.

    Attributes:
        labels: (R,) int64, the cluster of each point.
        signs: (R,) +1 or -1; a point counts as sign * point in its cluster.
        inertias: weighted sum of squared distances to the centroids, after each iteration.
    """

    labels: Tensor
    signs: Tensor
    inertias: tuple[float, ...]


def merge_units(
    pairs: Sequence[tuple[Tensor, Tensor]],
    weights: Sequence[float],
    clusters: int,
    *,
    mode: Literal["mass", "paper"] = "mass",
    balance: bool = True,
    sign_align: bool = True,
    param_reweight: bool = True,
    output_reweight: bool = True,
    n_init: int = 10,
    max_iter: int = 100,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """One LoRA (B (d, K), A (K, k)) of scale 1 out of the units of several, float64.

    Slots are in order of |b||a|, heaviest first; those that have no cluster (K is more than
    the number of distinct units, or a cluster's members cancel) are zero and come last.

    Args:
        pairs: per LoRA (s B (d, r_i), A (r_i, k)), ranks of any size. With `balance` it does
            not matter where the scale s is; without, give sqrt(s) to each factor.
        weights: one per LoRA, not negative; units of weight 0 are left out.
        clusters: K, at least 1.
        mode: "mass": weighted clusters, whose sum of weights multiplies the centroid, so that
            the result stands for sum_i w_i s_i B_i A_i, and is that for K = R. "paper":
            plain centroids; for K = R the sum of all LoRAs, but for `output_reweight`.
        balance: give both halves of each unit the same length first.
        sign_align: count (-a, -b) as (a, b).
        param_reweight: give a centroid the mean length of its members, for an average of
            vectors is shorter than they are.
        output_reweight: in mode "paper", multiply by sqrt(mean rank / K), for the variance
            of the output grows with the rank.
        n_init: starts of k-means, of which the best is taken.
        max_iter: most iterations of each start.
        generator: where the starts are drawn from.
    """
    assert clusters >= 1
    assert mode in ("mass", "paper")
    b = torch.cat([left.double() for left, _ in pairs], dim=1).T  # (R, d)
    a = torch.cat([right.double() for _, right in pairs], dim=0)  # (R, k)
    ranks = [right.shape[0] for _, right in pairs]
    owners = torch.repeat_interleave(torch.tensor(ranks))
    w = torch.tensor(list(weights), dtype=torch.float64)[owners]
    used = [rank for rank, weight in zip(ranks, weights, strict=True) if weight > 0]
    d, k = b.shape[1], a.shape[1]

    a, b, w = _prepare(a, b, w, balance)
    if not len(w):
        return _slots(b.new_zeros(0, d), a.new_zeros(0, k), clusters)
    if mode == "paper":
        w = torch.ones_like(w)
    gram = a @ a.T + b @ b.T
    starts = [
        k_means(gram, w, clusters, signed=sign_align, max_iter=max_iter, generator=generator)
        for _ in range(n_init)
    ]
    best = min(starts, key=lambda start: start.inertias[-1])

    coefficients, mass = _coefficients(best, w, clusters)  # (R,), (K,)
    _, norms2 = _inner_products(gram, best.labels, coefficients, clusters)
    norms = norms2.clamp(min=0).sqrt()
    lengths = gram.diagonal().sqrt()
    mean_lengths = _sums(coefficients.abs() * lengths, best.labels, clusters)
    # members that cancel leave rounding, which no length can be given to
    alive = (mass > 0) & (norms > math.sqrt(_SAME) * mean_lengths)
    gain = torch.where(alive, mean_lengths / norms, 0.0) if param_reweight else alive.double()
    coefficients = coefficients * gain[best.labels]
    new_a = _sums(coefficients[:, None] * a, best.labels, clusters)  # (K, k)
    new_b = _sums(coefficients[:, None] * b, best.labels, clusters)  # (K, d)
    if mode == "mass":
        new_b *= mass[:, None]
    elif output_reweight:
        new_b *= math.sqrt(sum(used) / len(used) / clusters)
    return _slots(new_b, new_a, clusters)


def k_means(
    gram: Tensor,
    weights: Tensor,
    clusters: int,
    *,
    signed: bool,
    max_iter: int,
    generator: torch.Generator,
) -> Clustering:
    """Lloyd's iterations from a k-means++ start, on inner products alone.

    The start: Arthur & Vassilvitskii, "k-means++: The Advantages of Careful Seeding", SODA
    2007, section 2.2. A cluster that loses its members takes the point farthest from its own
    centroid. With fewer distinct points than clusters, the last clusters have no member.

    Args:
        gram: (R, R) inner products of the points.
        weights: (R,) positive.
        clusters: K.
        signed: a point and its negative are the same point.
        max_iter: most iterations.
        generator: where the start is drawn from.
    """
    squares = gram.diagonal()
    seeds = _plus_plus(gram, weights, clusters, signed, generator)
    products, norms2 = gram[:, seeds], squares[seeds]  # (R, K'), (K',)
    labels = torch.full((len(gram),), -1)
    signs = torch.ones_like(squares)
    inertias: list[float] = []
    for _ in range(max_iter):
        distances = _distances(squares, products, norms2, signed)
        closest = fill_empty(distances.argmin(dim=1), distances, weights, len(norms2))
        inner = products.gather(1, closest[:, None])[:, 0]
        aligned = torch.where((inner < 0) & signed, -1.0, 1.0).to(signs)
        if torch.equal(closest, labels) and torch.equal(aligned, signs):
            break
        labels, signs = closest, aligned
        found = Clustering(labels, signs, ())
        coefficients, mass = _coefficients(found, weights, len(norms2))
        products, norms2 = _inner_products(gram, labels, coefficients, len(norms2))
        # sum_j w_j |m_j - mu|^2 = sum_j w_j |m_j|^2 - sum_c mass_c |mu_c|^2
        inertias.append(float((weights * squares).sum() - (mass * norms2).sum()))
    return Clustering(labels, signs, tuple(inertias))


def fill_empty(labels: Tensor, distances: Tensor, weights: Tensor, clusters: int) -> Tensor:
    """Give clusters without a member the points that are farthest from their own centroid.

    A point that is alone in its cluster, or at its centroid, stays.

    Args:
        labels: (R,) cluster of each point; changed in place and returned.
        distances: (R, K) squared distances to the centroids.
        weights: (R,) positive; the farthest is by weight times squared distance.
        clusters: K.
    """
    counts = torch.bincount(labels, minlength=clusters)
    cost = weights * distances.gather(1, labels[:, None])[:, 0]
    for empty in (counts == 0).nonzero()[:, 0].tolist():
        candidates = torch.where(counts[labels] > 1, cost, 0.0)
        farthest = int(candidates.argmax())
        if candidates[farthest] <= 0:
            break
        counts[labels[farthest]] -= 1
        counts[empty] += 1
        labels[farthest], cost[farthest] = empty, 0.0
    return labels


def _prepare(a: Tensor, b: Tensor, w: Tensor, balance: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Units that matter, balanced, in an order that no permutation of a LoRA's ranks changes."""
    norm_a, norm_b = a.norm(dim=1), b.norm(dim=1)
    size = norm_a * norm_b
    largest = size[w > 0].max() if bool((w > 0).any()) else size.new_zeros(())
    kept = ((w > 0) & (size > 0) & (size >= _NEGLIGIBLE * largest)).nonzero()[:, 0]
    kept = kept[size[kept].argsort(descending=True, stable=True)]
    a, b, w = a[kept], b[kept], w[kept]
    if balance:
        ratio = (norm_b[kept] / norm_a[kept]).sqrt()[:, None]
        a, b = a * ratio, b / ratio
    return a, b, w


def _distances(squares: Tensor, products: Tensor, norms2: Tensor, signed: bool) -> Tensor:
    """Squared distances (R, K) of points to centres, from their inner products (R, K)."""
    inner = products.abs() if signed else products
    total = squares[:, None] + norms2
    distances = total - 2 * inner
    return torch.where(distances > _SAME * total, distances, 0.0)


def _plus_plus(
    gram: Tensor, weights: Tensor, clusters: int, signed: bool, generator: torch.Generator
) -> Tensor:
    """At most `clusters` distinct points, each drawn by its distance to those before."""
    squares = gram.diagonal()
    seeds: list[int] = []
    chances = weights
    nearest = torch.full_like(squares, math.inf)
    while len(seeds) < clusters and bool((chances > 0).any()):
        seed = int(torch.multinomial(chances / chances.sum(), 1, generator=generator))
        seeds.append(seed)
        column = _distances(squares, gram[:, seed, None], squares[seed, None], signed)[:, 0]
        nearest = torch.minimum(nearest, column)
        chances = weights * nearest
    return torch.tensor(seeds)


def _coefficients(found: Clustering, weights: Tensor, clusters: int) -> tuple[Tensor, Tensor]:
    """Coefficient (R,) of each point in its centroid, and the mass (K,) of each cluster."""
    mass = _sums(weights, found.labels, clusters)
    return weights * found.signs / mass[found.labels], mass


def _inner_products(
    gram: Tensor, labels: Tensor, coefficients: Tensor, clusters: int
) -> tuple[Tensor, Tensor]:
    """Inner products (R, K) of points and centroids, and squared norms (K,) of the centroids."""
    products = _sums(coefficients[:, None] * gram, labels, clusters).T
    own = products.gather(1, labels[:, None])[:, 0]
    return products, _sums(coefficients * own, labels, clusters)


def _sums(rows: Tensor, labels: Tensor, clusters: int) -> Tensor:
    """(R, ...) -> (K, ...): the sum of the rows of each cluster."""
    return rows.new_zeros(clusters, *rows.shape[1:]).index_add_(0, labels, rows)


def _slots(b: Tensor, a: Tensor, clusters: int) -> tuple[Tensor, Tensor]:
    """(B (d, K), A (K, k)) of units (K', d), (K', k), K' <= K: heaviest first, zeros at the end."""
    size = a.norm(dim=1) * b.norm(dim=1)
    order = size.argsort(descending=True, stable=True)
    missing = clusters - len(size)
    b = torch.cat([b[order], b.new_zeros(missing, b.shape[1])])
    a = torch.cat([a[order], a.new_zeros(missing, a.shape[1])])
    return b.T.contiguous(), a
