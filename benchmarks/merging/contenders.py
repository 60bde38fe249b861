"""What the merging benchmark compares: the platform's methods, and their options to tune."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fedlora.adapters.inject import AdaptedModel
from fedlora.data.example import Example, collate
from fedlora.linalg import Pair, difference, gram_kernel, product_norm, stack
from fedlora.merging.merge import Recipe, merge_sources, normalise
from fedlora.merging.options import make_merger
from fedlora.merging.sources import Source

FACTORS = (0.15, 0.3, 0.6, 1.0, 1.8, 6.0)
"""Multiples of the mean; of six, 1.8 is 0.3 times their sum and 6 the sum."""

Grams = Mapping[str, Tensor]


@dataclass(frozen=True)
class Variant:
    """One choice of a contender's options, and a factor of the merged change."""

    options: Mapping[str, Any]
    factor: float = 1.0

    def __str__(self) -> str:
        parts = [f"{name}={value}" for name, value in self.options.items()]
        if self.factor != 1.0:
            parts.append(f"times {self.factor:g}")
        return ", ".join(parts)


@dataclass(frozen=True)
class Contender:
    """A way to merge.

    Attributes:
        label: its row in the tables.
        strategy: as in `fedlora merge --strategy`; None is the mean of the factors.
        grid: option -> values to try on the tuning seed.
        slots: rank of the result, in multiples of the largest rank of an adapter; None leaves
            it to the method.
        factors: the merged change is multiplied by one of these, tuned as well.
    """

    label: str
    strategy: str | None
    grid: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    slots: int | None = None
    factors: Sequence[float] = (1.0,)

    def variants(self) -> Iterator[Variant]:
        """Every combination of the grid."""
        for values in itertools.product(*self.grid.values()):
            for factor in self.factors:
                yield Variant(dict(zip(self.grid, values, strict=True)), factor)

    def merge(
        self,
        sources: Sequence[Source],
        options: Mapping[str, Any],
        grams: Sequence[Grams],
        seed: int,
    ) -> dict[str, Pair]:
        """The merged change of every layer, all adapters at equal weight."""
        if self.strategy is None:
            return factor_mean(sources)
        largest = max(layer.rank for source in sources for layer in source.spec.layers)
        recipe = Recipe(
            self.strategy,
            make_merger(self.strategy, options),
            normalise(None, len(sources)),
            rank=None if self.slots is None else self.slots * largest,
            seed=seed,
        )
        merged = merge_sources(sources, recipe, grams if recipe.merger.needs_data else ())
        return {
            layer.name: (merged.tensors[f"{layer.name}.B"], merged.tensors[f"{layer.name}.A"])
            for layer in merged.spec.layers
        }


BASELINE = "mean (task-arithmetic, scaling 1)"
_SCALING = {"scaling": FACTORS}
_LEGO = {"mode": ("mass",), "param_reweight": (True, False)}
# output_reweight is a factor as well, so it has no place beside a tuned one
_UNITS = {"mode": ("paper",), "param_reweight": (True, False)}
_PAPER = {**_UNITS, "output_reweight": (True, False)}
_REGMEAN = {"off_diagonal": (0.5, 0.9, 1.0)}

CONTENDERS = (
    Contender(BASELINE, "task-arithmetic"),
    Contender("flora", "flora"),
    Contender("fedex-lora", "fedex-lora"),
    Contender("fedex-lora, rank 2r", "fedex-lora", slots=2),
    Contender("flexlora", "flexlora"),
    Contender("factor mean", None),
    Contender("lora-lego mass", "lora-lego", _LEGO),
    Contender("lora-lego paper", "lora-lego", _PAPER),
    Contender("regmean", "regmean", _REGMEAN),
    Contender("task-arithmetic, tuned", "task-arithmetic", _SCALING),
    Contender("task-arithmetic, tuned, rank r", "task-arithmetic", _SCALING, slots=1),
    Contender("ties, tuned", "ties", {"density": (0.2, 0.5, 1.0), "scaling": FACTORS}),
    Contender("dare, tuned", "dare", {"drop": (0.5, 0.9), "scaling": FACTORS}),
    Contender("factor mean, times c", None, factors=FACTORS),
    Contender("lora-lego mass, times c", "lora-lego", _LEGO, factors=FACTORS),
    Contender("lora-lego paper, times c", "lora-lego", _UNITS, factors=FACTORS),
    Contender("lora-lego paper, rank 2r, times c", "lora-lego", _UNITS, slots=2, factors=FACTORS),
    Contender("regmean, times c", "regmean", _REGMEAN, factors=FACTORS),
)
"""r is the largest rank of an adapter; "times c" is no option of the method but a control,
which parts the direction of the merged change from its length."""


def factor_mean(sources: Sequence[Source]) -> dict[str, Pair]:
    """(mean B, mean A) of every layer, scale in B; smaller ranks count as padded with zeros.

    What other tools call linear or plain averaging of adapters.
    """
    merged = {}
    for name in sources[0].changes:
        changes = [source.changes[name] for source in sources]
        rank = max(right.shape[0] for _, right in changes)
        left = changes[0][0].new_zeros(changes[0][0].shape[0], rank)
        right = changes[0][1].new_zeros(rank, changes[0][1].shape[1])
        for b, a in changes:
            left[:, : b.shape[1]] += b / len(changes)
            right[: a.shape[0]] += a / len(changes)
        merged[name] = (left, right)
    return merged


def distance_from_mean(changes: Mapping[str, Pair], sources: Sequence[Source]) -> float:
    """|dW - mean| / |mean|, Frobenius norms over all layers, where mean is that of the dW_i."""
    off = total = 0.0
    for name, change in changes.items():
        mean = stack([source.changes[name] for source in sources], normalise(None, len(sources)))
        off += product_norm(*difference(change, mean)) ** 2
        total += product_norm(*mean) ** 2
    return float((off / total) ** 0.5)


def agreement(sources: Sequence[Source]) -> float:
    """Mean cosine between the changes of two adapters, all layers as one vector."""
    kernel = torch.stack(
        [gram_kernel([source.changes[name] for source in sources]) for name in sources[0].changes]
    ).sum(0)  # (n, n)
    norms = kernel.diagonal().sqrt()
    cosines = kernel / norms[:, None] / norms
    count = len(sources)
    return float((cosines.sum() - cosines.trace()) / (count * (count - 1)))


def collect_grams(adapted: AdaptedModel, examples: Sequence[Example]) -> dict[str, Tensor]:
    """Layer -> mean of x x^T (k, k), float64, over the inputs x of the adapted layers.

    `fedlora.merging.grams` reads texts only; these are pictures.
    """
    grams = {}

    def record(name: str, x: Tensor) -> None:
        rows = x.detach().flatten(0, -2).double()  # (tokens, k)
        grams[name] = rows.T @ rows / len(rows)

    hooks = [
        layer.register_forward_pre_hook(lambda _, inputs, name=name: record(name, inputs[0]))
        for name, layer in adapted.layers.items()
    ]
    adapted.model.eval()
    with torch.no_grad():
        adapted.model(**collate(list(examples), 0).inputs)
    for hook in hooks:
        hook.remove()
    return grams
