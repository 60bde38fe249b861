"""HetLoRA: clients of unequal rank, weighted by how much they learnt, that prune themselves.

Cho et al., "Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation Models",
https://arxiv.org/abs/2401.06432, section 3: zero-padding to the largest rank and truncation
(3.1), rank self-pruning by a penalty on the last slots (3.2), and sparsity-weighted
aggregation (3.3).

Differs from the paper: the norm of a client's change weighs besides its number of examples,
layer by layer, so that clients of equal norms are averaged as by FedIT (with
`federation.weighting = "uniform"` the norm alone counts). The server decides on pruning, from
what the client started with and sent. A slot that nobody trained in a round keeps its value,
for with both halves zero it would never have a gradient again.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch

from fedlora.adapter import LayerSpec, Tensors
from fedlora.errors import ConfigError
from fedlora.linalg import product_norm
from fedlora.messages import ClientUpdate, RoundPlan
from fedlora.strategies.base import ClientInfo, Conditions, Stats, Strategy, StrategyState, Updates


class HetLora(Strategy):
    """Weighted mean of zero-padded factors.

    Options: `gamma`, the part of a client's rank that its tail begins after; `penalty`, the
    weight lambda of |B_tail| |A_tail| in the client's loss; `sparsity`, whether norms weigh;
    `r_min`, the rank below which nobody is pruned.
    """

    name = "hetlora"
    exact = False
    linear = False
    hetero_rank = True
    needs = "product"
    options: ClassVar[Mapping[str, Any]] = {
        "gamma": 0.99,
        "penalty": 1e-3,
        "sparsity": True,
        "r_min": 1,
    }

    def check(self, given: Conditions) -> None:
        """Also that the options can be used.

        Raises:
            ConfigError: see `Strategy.check`.
        """
        super().check(given)
        place = "federation.strategy_options"
        gamma, penalty, r_min = (self.settings[key] for key in ("gamma", "penalty", "r_min"))
        if not 0 < gamma <= 1:
            raise ConfigError(f"{place}.gamma = {gamma:g}; expected 0 < gamma <= 1 (1: no pruning)")
        if not 0 <= penalty < math.inf:
            raise ConfigError(f"{place}.penalty = {penalty:g}; expected a number of at least 0")
        if r_min < 1:
            raise ConfigError(f"{place}.r_min = {r_min}; expected at least 1")

    def factors(self, state: StrategyState) -> tuple[str, ...]:
        return ("A", "B")

    def rank(self, state: StrategyState, client: ClientInfo) -> int:
        """What pruning has left of the client's rank."""
        left: int = state.extra.get("ranks", {}).get(client.name, client.rank)
        return min(client.rank, left)

    def plan(self, state: StrategyState, client: ClientInfo, plan: RoundPlan) -> RoundPlan:
        plan = super().plan(state, client, plan)
        tail = self._pruned(plan.rank)
        if tail == plan.rank:
            return plan
        return replace(plan, tail_slot=tail, tail_weight=float(self.settings["penalty"]))

    def reduce(self, state: StrategyState, updates: Updates) -> Stats:
        """Sums weighted layer by layer, and who is pruned to what rank."""
        total = sum(update.weight for update in updates)
        sums = self.head_sums(state, updates)
        for layer in state.spec.layers:
            weights = self._weights(updates, layer)
            a = torch.zeros(layer.rank, layer.inp, dtype=torch.float64)
            b = torch.zeros(layer.out, layer.rank, dtype=torch.float64)
            owned = torch.zeros(layer.rank, dtype=torch.bool)
            for weight, update in zip(weights, updates, strict=True):
                rank = update.delta.spec.layer(layer.name).rank
                a[:rank] += weight * update.trained[f"{layer.name}.A"]
                b[:, :rank] += weight * update.trained[f"{layer.name}.B"]
                owned[:rank] |= weight > 0
            old_a, old_b = (state.tensors[f"{layer.name}.{f}"].double() for f in ("A", "B"))
            sums[f"{layer.name}.A"] = total * a.where(owned[:, None], old_a)
            sums[f"{layer.name}.B"] = total * b.where(owned, old_b)
        pruned = {update.client: rank for update in updates if (rank := self._after(update))}
        return Stats(sums, total, notes={"pruned": pruned} if pruned else {})

    def refactor(self, state: StrategyState, stats: Stats) -> StrategyState:
        """The means take the factors' place; pruned clients keep their smaller ranks."""
        tensors = {name: mean.float() for name, mean in stats.mean().items()}
        ranks = {**state.extra.get("ranks", {}), **stats.notes.get("pruned", {})}
        return self.advance(state, tensors, {"ranks": ranks})

    def _weights(self, updates: Updates, layer: LayerSpec) -> list[float]:
        """g_i = p_i |s B_i A_i| / sum_j p_j |s B_j A_j|; p_i where all changes are zero."""
        shares = [update.weight for update in updates]
        if self.settings["sparsity"]:
            by_norm = [
                update.weight * product_norm(*self.product(update, layer.name))
                for update in updates
            ]
            shares = by_norm if any(by_norm) else shares
        return [share / sum(shares) for share in shares]

    def _pruned(self, rank: int) -> int:
        """The first slot of the tail, and the rank that pruning leaves."""
        fewest: int = self.settings["r_min"]
        gamma: float = self.settings["gamma"]
        return min(rank, max(fewest, math.floor(gamma * rank)))

    def _after(self, update: ClientUpdate) -> int:
        """The client's new rank if its tail has shrunk in this round; 0 if it stays."""
        rank = update.delta.spec.rank
        tail = self._pruned(rank)
        if tail == rank:
            return 0
        layers = update.delta.spec.layers
        before = _tail_norm(update.begin.tensors, layers, tail)
        return tail if _tail_norm(update.trained, layers, tail) < before else 0


def _tail_norm(tensors: Tensors, layers: tuple[LayerSpec, ...], tail: int) -> float:
    """Sum over layers of |B[:, tail:]|_F |A[tail:, :]|_F."""
    return sum(
        float(tensors[f"{layer.name}.B"][:, tail:].double().norm())
        * float(tensors[f"{layer.name}.A"][tail:].double().norm())
        for layer in layers
    )
