"""Geometric median of the clients' updates, found by weights alone.

Pillutla et al., "Robust Aggregation for Federated Learning", https://arxiv.org/abs/1912.13445,
section 3: the smoothed Weiszfeld algorithm, w_i proportional to p_i / max(eps, distance of
update i to the current median). The median is a convex combination of the updates, so that
all distances follow from those between updates, and the strategy inside merges it as a
weighted mean: of weight changes if it is exact, else of whatever it averages.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from fedlora.strategies.base import Conditions, StrategyState, Updates
from fedlora.strategies.wrappers.distances import Spaced, squared_distances

SMOOTHING = 1e-6  # eps, as a part of the median distance to the mean
MAX_STEPS = 10_000


class GeometricMedian(Spaced):
    """Updates with the weights whose mean is their geometric median.

    Options:
        space: where distances are taken, "product" or "factor".
    """

    name = "geometric-median"
    exact = False
    linear = False
    asynchronous = False
    privacy = frozenset({"record"})
    waives: Mapping[str, str] = {
        "heads": "heads are merged with the weights of the median",
    }
    options: ClassVar[Mapping[str, Any]] = {"space": "product"}

    def check(self, given: Conditions) -> None:
        super().check(given)
        self.check_space()

    def screen(self, state: StrategyState, updates: Updates) -> tuple[Updates, dict[str, Any]]:
        if not updates:
            return updates, {}
        weights = torch.tensor([u.weight for u in updates], dtype=torch.float64)
        total = float(weights.sum())
        distances = squared_distances(self.traits, state, updates, self.space)
        found = weiszfeld(distances, weights / total).tolist()
        passed = [replace(u, weight=w * total) for u, w in zip(updates, found, strict=True)]
        shares = {u.client: round(w, 6) for u, w in zip(updates, found, strict=True)}
        return passed, {"weights": shares}


def weiszfeld(distances: Tensor, weights: Tensor) -> Tensor:
    """Weights (n,), sum 1, of the points whose mean is their weighted geometric median.

    Args:
        distances: squared, between all points, (n, n).
        weights: p_i, (n,), sum 1.
    """
    found = weights
    away = _away(distances, found)
    # of points with a weight, for a client that counts for nothing must change nothing
    eps = SMOOTHING * float(away[weights > 0].median())
    if eps == 0.0:
        return weights
    for _ in range(MAX_STEPS):
        new = weights / away.clamp(min=eps)
        new = new / new.sum()
        moved = float((new - found).abs().max())
        found = new
        if moved < 1e-15:
            break
        away = _away(distances, found)
    return found


def _away(distances: Tensor, weights: Tensor) -> Tensor:
    """Distance of every point to the mean with these weights, (n,)."""
    towards = distances @ weights
    return (towards - 0.5 * (weights @ towards)).clamp(min=0.0).sqrt()
