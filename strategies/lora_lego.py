"""LoRA-LEGO: in every round the clients' rank-one units are clustered into a new adapter.

Zhao et al., "Merging LoRAs like Playing LEGO: Pushing the Modularity of LoRA to Extremes
Through Rank-Wise Clustering", https://arxiv.org/abs/2409.16167: minimal semantic units,
rank-wise clustering, and the dual reweighting (see `rank_clustering`).

Differs from the paper, which merges once: a run of one round is that merge. Over rounds the
default `mode = "mass"` keeps the scale of the mean change, which would otherwise drift with
the number of clients; and centroids are not made longer, for what is gained in every round
grows without bound. The number of clusters is the rank of the global adapter; slots are in
order of their size, so that a client of smaller rank receives the heaviest units.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from fedlora.errors import ConfigError, near_miss
from fedlora.linalg import fill_dead
from fedlora.messages import Pair
from fedlora.seeds import generator
from fedlora.strategies.base import Conditions, Stats, Strategy, StrategyState, Updates
from fedlora.strategies.rank_clustering import merge_units

MODES = ("mass", "paper")


class LoraLego(Strategy):
    """k-means on the units (a_j, b_j) of all clients; each centroid is a unit of the result.

    Options: `mode` is "mass" or "paper"; `balance`, `sign_align`, `param_reweight` (by
    default only in mode "paper"), `output_reweight`, `n_init` and `max_iter` are those of
    `merge_units`.
    """

    name = "lora-lego"
    exact = False
    linear = False
    hetero_rank = True
    needs = "product"
    regauges = True
    waives: Mapping[str, str] = {
        "split": "two halves of a client are twice as many units to cluster",
    }
    options: ClassVar[Mapping[str, Any]] = {
        "mode": "mass",
        "balance": True,
        "sign_align": True,
        "param_reweight": None,
        "output_reweight": True,
        "n_init": 10,
        "max_iter": 100,
    }

    def check(self, given: Conditions) -> None:
        """Also that the options can be used.

        Raises:
            ConfigError: see `Strategy.check`.
        """
        super().check(given)
        place = "federation.strategy_options"
        mode = self.settings["mode"]
        if mode not in MODES:
            raise ConfigError(
                f'{place}.mode = "{mode}" is not known to strategy {self.name!r}'
                f"{near_miss(mode, MODES)}; known: {', '.join(MODES)}"
            )
        reweight = self.settings["param_reweight"]
        if not isinstance(reweight, bool | None):
            raise ConfigError(f"{place}.param_reweight = {reweight!r}; expected true or false")
        for key in ("n_init", "max_iter"):
            if self.settings[key] < 1:
                raise ConfigError(f"{place}.{key} = {self.settings[key]}; expected at least 1")

    def factors(self, state: StrategyState) -> tuple[str, ...]:
        return ("A", "B")

    def reduce(self, state: StrategyState, updates: Updates) -> Stats:
        """The clustered units of every layer, and the sums of the heads."""
        total = sum(update.weight for update in updates)
        weights = [update.weight / total for update in updates]
        settings = dict(self.settings)
        if settings["param_reweight"] is None:
            settings["param_reweight"] = settings["mode"] == "paper"
        merged: dict[str, Pair] = {}
        for layer in state.spec.layers:
            pairs = [self.product(update, layer.name) for update in updates]
            # without `balance` the scale belongs in equal parts to both halves of a unit
            root = layer.scale**0.5
            merged[layer.name] = merge_units(
                [(b / root, root * a) for b, a in pairs],
                weights,
                layer.rank,
                generator=generator(state.spec.seed, self.name, state.round, layer.name),
                **settings,
            )
        return Stats(self.head_sums(state, updates), total, merged)

    def refactor(self, state: StrategyState, stats: Stats) -> StrategyState:
        """The merged units take the place of the factors.

        A layer in which no client moved keeps its A, and its B becomes zero; elsewhere slots
        without a unit get a fresh row of A, for with two zero halves they would never learn.
        """
        tensors = {name: mean.float() for name, mean in stats.mean().items()}
        for layer in state.spec.layers:
            b, a = stats.stacks[layer.name]
            if not bool(b.any()):
                a = state.tensors[f"{layer.name}.A"].double()
            draws = generator(state.spec.seed, self.name, "fill", state.round, layer.name)
            b, a = fill_dead(b, a, draws)
            tensors[f"{layer.name}.A"] = a.float().contiguous()
            tensors[f"{layer.name}.B"] = (b / layer.scale).float().contiguous()
        return self.advance(state, tensors)
