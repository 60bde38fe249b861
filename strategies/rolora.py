"""RoLoRA: the factors are trained in turn, one per round, so that every round is exact.

Chen et al., "Robust Federated Finetuning of LLMs via Alternating Optimization of LoRA",
https://arxiv.org/abs/2502.01755, section 3.

The zero-initialised factor comes first: with it at zero the other has no gradient. The
server dictates the factor from its own round count; a client that was absent keeps no
count of its own.
"""

from dataclasses import replace

from fedlora.strategies.base import Needs, Stats, Strategy, StrategyState, bilinear


class RoLora(Strategy):
    """Odd rounds train the zero-initialised factor, even rounds the other one."""

    name = "rolora"
    exact = True
    linear = True
    hetero_rank = True
    needs: Needs = "bilinear"
    privacy = frozenset({"record", "client"})

    def factors(self, state: StrategyState) -> tuple[str, ...]:
        return (bilinear(self.traits)[state.round % 2],)

    def refactor(self, state: StrategyState, stats: Stats) -> StrategyState:
        """The mean takes the place of the trained factor.

        A slot that no client of the round holds comes out as zero. If its frozen factor is
        zero as well, the slot would never have a gradient again, so it keeps its old value
        (which changes no product).
        """
        new = super().refactor(state, stats)
        zero, other = bilinear(self.traits)
        (trained,) = self.factors(state)
        tensors = dict(new.tensors)
        for layer in state.spec.layers:
            b, a = tensors[f"{layer.name}.{zero}"], tensors[f"{layer.name}.{other}"]
            if b.dim() == 2 and b.shape[1] == a.shape[0]:  # (d, r) and (r, k)
                dead = (b == 0).all(0) & (a == 0).all(1)
                name = f"{layer.name}.{trained}"
                slots = dead if trained == zero else dead[:, None]
                tensors[name] = state.tensors[name].where(slots, tensors[name])
        return replace(new, tensors=tensors)
