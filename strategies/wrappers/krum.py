"""Krum and Multi-Krum: only updates that have many near neighbours are kept.

Blanchard et al., "Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent",
https://arxiv.org/abs/1703.02757, section 4: the score of an update is the sum of its squared
distances to the n - f - 2 nearest others, f of n clients being hostile, 2 f + 2 < n. Krum
takes the update of lowest score, Multi-Krum the mean of the m lowest.
"""

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from fedlora.errors import ConfigError, StrategyError
from fedlora.strategies.base import Conditions, Strategy, StrategyState, Updates
from fedlora.strategies.wrappers.distances import Spaced, squared_distances


class MultiKrum(Spaced):
    """The m updates of lowest score, averaged with their own weights.

    Options:
        hostile: f; 0 takes the largest f below (n - 2) / 2, but at most three tenths of n:
            every client taken for hostile by default is one whose data are lost.
        keep: m; 0 takes n - f, which is also the most that are ever kept.
        space: where distances are taken, "product" or "factor".
    """

    name = "multi-krum"
    exact = False
    linear = False
    asynchronous = False
    privacy = frozenset({"record"})
    waives: Mapping[str, str] = {
        "absent": "fewer than 2 f + 3 updates have no score and are refused",
        "alone": "fewer than 2 f + 3 updates have no score and are refused",
        "split": "scores count neighbours, not their weights",
        "zero-weight": "scores count neighbours, not their weights",
    }
    options: ClassVar[Mapping[str, Any]] = {"hostile": 0, "keep": 0, "space": "product"}

    def __init__(self, inner: Strategy, options: Mapping[str, Any] | None = None) -> None:
        super().__init__(inner, options)
        for key in ("hostile", "keep"):
            if self.settings.get(key, 0) < 0:
                raise ConfigError(
                    f"federation.wrappers.{self.name}.{key} = {self.settings[key]}; expected a "
                    "number of clients, or 0 for the default"
                )

    def check(self, given: Conditions) -> None:
        super().check(given)
        self.check_space()
        n = min(len(given.ranks), given.clients_per_round or len(given.ranks))
        if why := self._too_few(n):
            raise ConfigError(f"wrapper {self.name!r}, rounds of {n} clients: {why}")

    def screen(self, state: StrategyState, updates: Updates) -> tuple[Updates, dict[str, Any]]:
        n = len(updates)
        if why := self._too_few(n):
            raise StrategyError(f"wrapper {self.name!r}, round of {n} updates: {why}")
        f = self.hostile(n)
        scores = krum_scores(squared_distances(self.traits, state, updates, self.space), f)
        # the sort is stable and updates are ordered by name, so that ties have one winner
        order = scores.argsort(stable=True).tolist()
        kept = sorted(order[: self.keep(n)])
        out = sorted(set(range(n)) - set(kept))
        return [updates[i] for i in kept], {"left_out": [updates[i].client for i in out]}

    def hostile(self, n: int) -> int:
        """F for n updates."""
        return int(self.settings["hostile"]) or max(0, min((n - 3) // 2, math.floor(0.3 * n)))

    def keep(self, n: int) -> int:
        """M for n updates."""
        most = n - self.hostile(n)
        return min(int(self.settings["keep"]) or most, most)

    def _too_few(self, n: int) -> str:
        f = self.hostile(n)
        if n > 2 * f + 2:
            return ""
        most = max(0, (n - 3) // 2)
        lower = f"lower federation.wrappers.{self.name}.hostile to at most {most}, or " if f else ""
        return (
            f"{f} hostile clients need more than 2 * {f} + 2 = {2 * f + 2} updates in a round; "
            f"{lower}take more clients"
        )


class Krum(MultiKrum):
    """The one update of lowest score, as it is.

    Options:
        hostile, space: as for Multi-Krum.
    """

    name = "krum"
    waives: Mapping[str, str] = {
        **MultiKrum.waives,
        "heads": "heads are those of the one client that is taken",
    }
    options: ClassVar[Mapping[str, Any]] = {"hostile": 0, "space": "product"}

    def keep(self, n: int) -> int:
        return 1


def krum_scores(distances: Tensor, hostile: int) -> Tensor:
    """Sum of the squared distances to the n - f - 2 nearest others, (n,).

    Args:
        distances: squared, (n, n).
        hostile: f.
    """
    n = distances.shape[0]
    others = distances.clone().fill_diagonal_(torch.inf)
    return others.sort(1).values[:, : n - hostile - 2].sum(1)
