"""LoDD: an update whose neighbours all lie on one side of it stands apart from the others.

Local direction dispersion measures how evenly the unit vectors u_j to the nearest neighbours
of a point spread, from the eigenvalues l of their covariance C in D dimensions:
1/2 (sum l)^2 + 1/2 D / (D - 1) ((sum l)^2 - sum l^2). It is 1 inside an isotropic cloud and 0
on the end of a ray. No eigenvalue is needed, for sum l = tr C and sum l^2 = tr C^2, and both
follow from the cosines between the u_j, i.e. from distances between points.

Against it stands what an independent cloud of more dimensions than neighbours scores: any
two directions then have cosine 1/2, which gives L0 = (kappa - 1)(2 kappa - 3) / (8 kappa^2).

It finds single clients and coordinated groups of up to about a third of kappa; a larger
colluding group looks like a cloud of its own. A rare but honest domain stands apart as well,
so that the default only writes down who was flagged.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from fedlora.errors import ConfigError
from fedlora.strategies.base import Conditions, Strategy, StrategyState, Updates
from fedlora.strategies.wrappers.distances import Spaced, squared_distances

FEWEST = 12  # with fewer updates honest ones score low as well
MOST_DROPPED = 0.3
LESS = 0.1


class Lodd(Spaced):
    """Flags updates that stand apart and, if asked to, counts them less or not at all.

    Options:
        action: "log", "downweight" (to a tenth) or "drop". It is taken on at most three
            tenths of the updates, lowest scores first.
        kappa: neighbours; 0 takes three quarters of the others.
        threshold: an update is flagged below this part of L0.
        space: where directions are taken, "product" or "factor".
    """

    name = "lodd"
    exact = False
    linear = False
    asynchronous = False
    privacy = frozenset({"record"})
    options: ClassVar[Mapping[str, Any]] = {
        "action": "log",
        "kappa": 0,
        "threshold": 0.7,
        "space": "product",
    }

    def __init__(self, inner: Strategy, options: Mapping[str, Any] | None = None) -> None:
        super().__init__(inner, options)
        place, action = f"federation.wrappers.{self.name}", self.settings["action"]
        if action not in ("log", "downweight", "drop"):
            raise ConfigError(
                f'{place}.action = "{action}" is not known; choose "log", "downweight" or "drop"'
            )
        if self.settings["kappa"] < 0 or self.settings["kappa"] == 1:
            raise ConfigError(
                f"{place}.kappa = {self.settings['kappa']}; expected at least 2 neighbours, or 0 "
                "for the default"
            )
        if action == "log":
            self.exact = inner.exact

    def check(self, given: Conditions) -> None:
        super().check(given)
        self.check_space()

    def screen(self, state: StrategyState, updates: Updates) -> tuple[Updates, dict[str, Any]]:
        n = len(updates)
        if n < FEWEST:
            return updates, {"inactive": f"{n} updates, fewer than {FEWEST}"}
        kappa = min(self.settings["kappa"] or math.floor(0.75 * (n - 1)), n - 1)
        distances = squared_distances(self.traits, state, updates, self.space)
        scores = dispersions(distances, kappa) / cloud_score(kappa)
        low = [i for i in scores.argsort(stable=True).tolist() if scores[i] < self._threshold]
        notes: dict[str, Any] = {
            "flagged": {updates[i].client: round(float(scores[i]), 4) for i in sorted(low)}
        }
        if self.settings["action"] == "log":
            return updates, notes
        acted = set(low[: math.floor(MOST_DROPPED * n)])
        notes["acted_on"] = [updates[i].client for i in sorted(acted)]
        if self.settings["action"] == "drop":
            return [u for i, u in enumerate(updates) if i not in acted], notes
        return [
            replace(u, weight=u.weight * LESS) if i in acted else u for i, u in enumerate(updates)
        ], notes

    @property
    def _threshold(self) -> float:
        return float(self.settings["threshold"])


def cloud_score(kappa: int) -> float:
    """L0: the score of an independent cloud of far more dimensions than kappa neighbours."""
    return (kappa - 1) * (2 * kappa - 3) / (8 * kappa**2)


def dispersions(distances: Tensor, kappa: int, dimension: float = math.inf) -> Tensor:
    """LoDD of every point, (n,), float64.

    A neighbour at distance zero has no direction and is left out; a point with nothing but
    such neighbours scores 1, for nothing sets it apart.

    Args:
        distances: squared, between all points, (n, n).
        kappa: neighbours, at most n - 1.
        dimension: D of the space; in one dimension the second term is zero.
    """
    n = distances.shape[0]
    others = distances.clone().fill_diagonal_(torch.inf)
    near = others.argsort(dim=1, stable=True)[:, :kappa]  # (n, kappa)
    spread = 1.0 if math.isinf(dimension) else dimension / (dimension - 1) if dimension > 1 else 0.0
    found = torch.ones(n, dtype=torch.float64)
    for i in range(n):
        rows = near[i][distances[i, near[i]] > 0]
        if not len(rows):
            continue
        squared = distances[i, rows].double()  # (m,)
        lengths = squared.sqrt()
        among = distances[rows][:, rows].double()  # (m, m)
        cosines = (squared[:, None] + squared[None, :] - among) / (
            2 * lengths[:, None] * lengths[None, :]
        )
        # covariance about the mean: both axes centred
        cosines = cosines - cosines.mean(0)
        cosines = cosines - cosines.mean(1, keepdim=True)
        m = len(rows)
        trace = float(cosines.diagonal().sum()) / m
        squares = float((cosines**2).sum()) / m**2
        found[i] = 0.5 * trace**2 + 0.5 * spread * (trace**2 - squares)
    return found
