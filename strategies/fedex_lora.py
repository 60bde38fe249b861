"""FedEx-LoRA: the factors are averaged, and what that misses goes into the base.

Singhal et al., "FedEx-LoRA: Exact Aggregation for Federated and Efficient Fine-Tuning of
Foundation Models", https://arxiv.org/abs/2410.09432, section 4.

The mean of products is s B A of the mean factors plus the residual
E = s sum_i p_i (B_i - B)(A_i - A), of rank (n - 1) r at most. E becomes a fold of the frozen
base at every client, so that the merge is exact and the factors carry over.

Exactness of the mean is not optimality: clients that fit their own data far from the common
answer leave a residual that no later round takes back, for the base is not trained. The norm
of E is in the record of every round; `residual_scale` folds only a part of it.

Differs from the paper: unequal ranks are padded with zeros for the means, which leaves every
client's product as it is.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from fedlora.adapter import LayerSpec, MethodTraits, Tensors
from fedlora.errors import ConfigError
from fedlora.linalg import Pair, difference, fill_dead, recompress, stack
from fedlora.seeds import generator
from fedlora.strategies.base import Stats, Strategy, StrategyState, Updates, bilinear
from fedlora.strategies.fold import add_fold

# below this share of the factors' norms, a residual is rounding
_NOISE = 1e-12


class FedExLora(Strategy):
    """Mean factors, and their error folded into the base.

    Options:
        residual_rank: largest rank of a round's residual per layer; 0 for all of it. A
            smaller one is the best approximation of that rank.
        residual_scale: the part of the residual that is folded, 0 to 1.
    """

    name = "fedex-lora"
    exact = True
    linear = False
    hetero_rank = True
    needs = "product"
    folds = True
    options: ClassVar[Mapping[str, Any]] = {"residual_rank": 0, "residual_scale": 1.0}

    def __init__(self, traits: MethodTraits, options: Mapping[str, Any] | None = None) -> None:
        super().__init__(traits, options)
        rank, scale = self.settings["residual_rank"], self.settings["residual_scale"]
        if rank < 0:
            raise ConfigError(
                f"federation.strategy_options.residual_rank = {rank}; expected 0 (all) or more"
            )
        if not 0 <= scale <= 1:
            raise ConfigError(
                f"federation.strategy_options.residual_scale = {scale}; expected 0 to 1"
            )
        self.exact = rank == 0 and scale == 1

    def factors(self, state: StrategyState) -> tuple[str, ...]:
        return tuple(sorted(bilinear(self.traits)))

    def reduce(self, state: StrategyState, updates: Updates) -> Stats:
        """Sums of the factors; `stacks` holds the residual of every layer.

        `notes`: `residual_norm`, the norm of the whole residual over all layers, and
        `residual_rank`, the largest of its ranks.
        """
        sums = self.sums(state, updates)
        weight = sum(update.weight for update in updates)
        residuals = {
            layer.name: recompress(*self._residual(state, updates, layer, sums, weight))
            for layer in state.spec.layers
        }
        # L = U S has the singular values for column norms
        square = sum(float((left**2).sum()) for left, _ in residuals.values())
        notes = {
            "residual_norm": math.sqrt(square),
            "residual_rank": max((right.shape[0] for _, right in residuals.values()), default=0),
        }
        return Stats(sums, weight, residuals, notes)

    def refactor(self, state: StrategyState, stats: Stats) -> StrategyState:
        means = {name: mean.float() for name, mean in stats.mean().items()}
        zero, other = bilinear(self.traits)
        for layer in state.spec.layers:
            # slots that no client of the round holds; a new row of A changes no product
            b, a = f"{layer.name}.{zero}", f"{layer.name}.{other}"
            draws = generator(state.spec.seed, self.name, state.round + 1, layer.name)
            means[b], means[a] = fill_dead(means[b], means[a], draws)
        scale, rank = self.settings["residual_scale"], self.settings["residual_rank"]
        parts = {
            name: (scale * left[:, : rank or None], right[: rank or None])
            for name, (left, right) in stats.stacks.items()
        }
        new = self.advance(state, means)
        if not scale or not any(right.shape[0] for _, right in parts.values()):
            return new
        return replace(new, tensors=add_fold(new.tensors, state.spec, new.round, parts))

    def _residual(
        self,
        state: StrategyState,
        updates: Updates,
        layer: LayerSpec,
        sums: Tensors,
        weight: float,
    ) -> Pair:
        """E as a stack (d, R), (R, k); of rank 0 when it is nothing but rounding."""
        zero, other = (f"{layer.name}.{factor}" for factor in bilinear(self.traits))
        mean_b, mean_a = sums[zero] / weight, sums[other] / weight
        padded = len(updates) * layer.rank
        own = sum(update.delta.spec.layer(layer.name).rank for update in updates) + layer.rank
        if padded > own or any(update.products is not None for update in updates):
            # of unequal ranks the padded stack is the wider one; and a wrapper may have put
            # other products in place of those of the factors
            mean = self.stacks(state, updates)[layer.name]
            return difference(mean, (layer.scale * mean_b, mean_a))
        # centred, for the difference of two large products would lose digits
        pairs = []
        bound = whole = 0.0
        for update in updates:
            tensors = self.lift(state.spec, update)
            b, a = tensors[zero], tensors[other]
            pairs.append((layer.scale * (b - mean_b), a - mean_a))
            bound += update.weight * float((b - mean_b).norm() * (a - mean_a).norm())
            whole += update.weight * float(b.norm() * a.norm())
        left, right = stack(pairs, [update.weight / weight for update in updates])
        rank = 0 if bound <= _NOISE * whole else right.shape[0]
        return left[:, :rank], right[:rank]
