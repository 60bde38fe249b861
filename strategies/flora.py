"""FLoRA: the stacked factors are folded into the base, and adapters start anew.

Wang et al., "FLoRA: Federated Fine-Tuning Large Language Models with Heterogeneous Low-Rank
Adaptations", https://arxiv.org/abs/2409.05976, section 3.

[s p_1 B_1 | ... | s p_n B_n] [A_1; ...; A_n] is the exact mean of the clients' products, for
any ranks. It becomes a fold of the frozen base; the next round starts from fresh factors with
B = 0, drawn from a new seed, so that the rank of the model's change grows with the rounds. A
client draws the fresh factors itself and fetches only the folds that it lacks.

Differs from the paper: clients receive the recompressed product, whose rank is at most
min(d, k), instead of the stack, in which each would see every other client's update.
"""

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from fedlora.linalg import recompress
from fedlora.messages import RoundPlan
from fedlora.seeds import derive_seed
from fedlora.strategies.base import (
    ClientInfo,
    Stats,
    Strategy,
    StrategyState,
    Updates,
    bilinear,
)
from fedlora.strategies.fold import add_fold


class Flora(Strategy):
    """The exact mean goes into the base; the factors restart every round."""

    name = "flora"
    exact = True
    linear = False
    hetero_rank = True
    needs = "product"
    regauges = True

    def factors(self, state: StrategyState) -> tuple[str, ...]:
        return tuple(sorted(bilinear(self.traits)))

    def plan(self, state: StrategyState, client: ClientInfo, plan: RoundPlan) -> RoundPlan:
        return replace(super().plan(state, client, plan), fresh=self._seed(state))

    def reduce(self, state: StrategyState, updates: Updates) -> Stats:
        weight = sum(update.weight for update in updates)
        return Stats(self.head_sums(state, updates), weight, self.stacks(state, updates))

    def refactor(self, state: StrategyState, stats: Stats) -> StrategyState:
        pairs = {name: recompress(*stats.stacks[name]) for name in stats.stacks}
        new = self.advance(state, {name: mean.float() for name, mean in stats.mean().items()})
        tensors: Mapping[str, Tensor] = {**new.tensors, **self._fresh(new)}
        if any(right.shape[0] for _, right in pairs.values()):
            tensors = add_fold(tensors, state.spec, new.round, pairs)
        return replace(new, tensors=tensors)

    def _fresh(self, state: StrategyState) -> dict[str, Tensor]:
        """The factors that the next round starts from."""
        seed = self._seed(state)
        return {
            f"{layer.name}.{factor}": tensor
            for layer in state.spec.layers
            for factor, tensor in self.traits.fresh(layer, seed).items()
        }

    def _seed(self, state: StrategyState) -> int:
        """The seed of the next round's factors; the first round's are the initial adapter."""
        seed = state.spec.seed
        return derive_seed(seed, self.name, state.round + 1) if state.round else seed
