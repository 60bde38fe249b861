"""FlexLoRA: the clients' weight changes are averaged and cut to rank by an SVD.

Bai et al., "Federated Fine-tuning of Large Language Models under Heterogeneous Tasks and
Client Resources", https://arxiv.org/abs/2402.11505, section 3.2.

T = sum_i p_i s B_i A_i is held as a stack of the clients' factors and never formed. A client
of rank r_i receives the leading r_i slots, which are the best approximation of T at its rank
(Eckart and Young). Weights that do not look at rank let the energy of T move into the slots
that all clients share; the record of the round shows how much is left beyond them.

Differs from the released code: the SVD is that of the small core of the stack; a mean change
of zero keeps the previous A; slots beyond the rank of T get a fresh row of A, for a slot that
is zero in both factors would never have a gradient again.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from fedlora.adapter import MethodTraits
from fedlora.errors import ConfigError
from fedlora.linalg import Pair, fill_dead, truncate
from fedlora.seeds import generator
from fedlora.strategies.base import Stats, Strategy, StrategyState, Updates, bilinear

SPLITS = ("left", "balanced")


class FlexLora(Strategy):
    """The best adapter of the global rank for the mean weight change.

    Options:
        svd_split: "left" gives B = U S / s and A = V^T; "balanced" shares sqrt(S) between
            them, which suits smaller learning rates of B and larger ones of A.
    """

    name = "flexlora"
    exact = False
    linear = False
    hetero_rank = True
    needs = "product"
    regauges = True
    asynchronous = True
    options: ClassVar[Mapping[str, Any]] = {"svd_split": "left"}

    def __init__(self, traits: MethodTraits, options: Mapping[str, Any] | None = None) -> None:
        super().__init__(traits, options)
        if self.settings["svd_split"] not in SPLITS:
            raise ConfigError(
                f"federation.strategy_options.svd_split = {self.settings['svd_split']!r}; "
                f"expected {' or '.join(map(repr, SPLITS))}"
            )

    def factors(self, state: StrategyState) -> tuple[str, ...]:
        return tuple(sorted(bilinear(self.traits)))

    def reduce(self, state: StrategyState, updates: Updates) -> Stats:
        """The mean product of every layer at the global rank, and what the cut leaves out.

        The cut is made here, so that one layer's stack of all clients is held at a time.

        `notes` are shares of ||T||_F^2 over all layers: `energy_beyond_smallest_rank` past the
        smallest rank of the round's clients (near zero: the higher ranks are not used), and
        `energy_dropped` past the global rank.
        """
        stacks: dict[str, Pair] = {}
        total = beyond = dropped = 0.0
        for name, (left, right) in self.stacks(state, updates).items():
            rank = state.spec.layer(name).rank
            b, a, sigma = truncate(left, right, rank)
            stacks[name] = b, a
            energy = sigma**2
            smallest = min(update.delta.spec.layer(name).rank for update in updates)
            total += float(energy.sum())
            beyond += float(energy[smallest:].sum())
            dropped += float(energy[rank:].sum())
        notes = {
            "energy_beyond_smallest_rank": beyond / total if total else 0.0,
            "energy_dropped": dropped / total if total else 0.0,
        }
        weight = sum(update.weight for update in updates)
        return Stats(self.head_sums(state, updates), weight, stacks, notes)

    def refactor(self, state: StrategyState, stats: Stats) -> StrategyState:
        tensors = {name: mean.float() for name, mean in stats.mean().items()}
        zero, other = bilinear(self.traits)
        for layer in state.spec.layers:
            b_name, a_name = f"{layer.name}.{zero}", f"{layer.name}.{other}"
            left, right = stats.stacks[layer.name]
            b, a, _ = truncate(
                left / layer.scale, right, layer.rank, split=self.settings["svd_split"]
            )
            if not bool(b.any()):
                tensors[b_name] = torch.zeros_like(state.tensors[b_name])
                tensors[a_name] = state.tensors[a_name]
                continue
            draws = generator(state.spec.seed, self.name, state.round + 1, layer.name)
            b, a = fill_dead(b, a, draws)
            tensors[b_name], tensors[a_name] = b.float(), a.float()
        return self.advance(state, tensors)
