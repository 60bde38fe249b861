"""One merged adapter of several: changes by a merger, fully trained heads by their mean."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedlora.adapter import AdapterSpec, LayerSpec, Tensors, tensors_digest
from fedlora.errors import ConfigError
from fedlora.linalg import Pair, difference, product_norm, stack
from fedlora.merging.base import Given, Merger
from fedlora.merging.sources import Source


@dataclass(frozen=True)
class Recipe:
    """How to merge.

    Attributes:
        strategy: name of the method.
        merger: the method with its options.
        weights: one per adapter, of sum 1.
        rank: rank of the result; None leaves it to the method.
        seed: for methods that draw.
    """

    strategy: str
    merger: Merger
    weights: tuple[float, ...]
    rank: int | None = None
    seed: int = 0


@dataclass(frozen=True)
class Merged:
    """The result.

    Attributes:
        spec: a LoRA whose layers have scale 1.
        tensors: its factors and heads, float32.
        distance_from_mean: |dW - mean| / |mean| over all layers, Frobenius norms, where mean
            is sum_i w_i dW_i; None where the mean is zero.
    """

    spec: AdapterSpec
    tensors: Tensors
    distance_from_mean: float | None


def normalise(weights: Sequence[float] | None, count: int) -> tuple[float, ...]:
    """Weights of sum 1; equal ones for None.

    Raises:
        ConfigError: not one per adapter, negative, not finite, or all zero.
    """
    given = [1.0] * count if weights is None else list(weights)
    if len(given) != count:
        raise ConfigError(f"--weights has {len(given)} numbers for {count} adapters; give one each")
    for weight in given:
        if not math.isfinite(weight) or weight < 0.0:
            raise ConfigError(f"--weights holds {weight:g}; expected finite numbers from 0 up")
    largest = max(given)
    if largest == 0.0:
        raise ConfigError("--weights are all 0; expected at least one above")
    # first by the largest, for the sum of huge weights is not finite
    total = sum(weight / largest for weight in given)
    return tuple(weight / largest / total for weight in given)


def merge_sources(
    sources: Sequence[Source], recipe: Recipe, grams: Sequence[Mapping[str, Tensor]] = ()
) -> Merged:
    """Merges adapters that passed `check_match`; those of weight 0 are left out.

    Args:
        sources: the adapters.
        recipe: how.
        grams: per adapter, see `collect_grams`; only where the method needs data.

    Raises:
        ConfigError: a rank that is too large for the layers or the method.
    """
    weights = recipe.weights
    used = [i for i, weight in enumerate(weights) if weight > 0.0]
    names = [layer.name for layer in sources[0].spec.layers]
    given = Given(
        layers={name: tuple(sources[i].changes[name] for i in used) for name in names},
        weights=tuple(weights[i] for i in used),
        rank=recipe.rank,
        seed=recipe.seed,
        grams={name: tuple(grams[i][name] for i in used) for name in names} if grams else {},
    )
    _check_rank(given, recipe.merger)
    changes = recipe.merger.merge(given)
    spec = _spec(sources, changes, recipe.seed)
    tensors = {
        head: torch.stack([weights[i] * sources[i].heads[head].double() for i in used])
        .sum(0)
        .float()
        for head in spec.head_shapes
    }
    for name, (left, right) in changes.items():
        tensors[f"{name}.B"], tensors[f"{name}.A"] = left.float(), right.float()
    return Merged(spec, tensors, _distance(changes, given))


def _check_rank(given: Given, merger: Merger) -> None:
    if given.rank is None:
        return
    sums = []
    for name, changes in given.layers.items():
        d, k = changes[0][0].shape[0], changes[0][1].shape[1]
        sums.append(sum(right.shape[0] for _, right in changes))
        if given.rank > min(d, k):
            raise ConfigError(
                f"--rank {given.rank} is too large for layer {name} of shape ({d}, {k}); "
                f"expected at most {min(d, k)}"
            )
    if not merger.full_rank and given.rank > max(sums):
        raise ConfigError(
            f"--rank {given.rank} is more than the ranks of the adapters together, {max(sums)}; "
            "expected at most that"
        )


def _spec(sources: Sequence[Source], changes: Mapping[str, Pair], seed: int) -> AdapterSpec:
    first = sources[0].spec
    layers = tuple(
        LayerSpec(layer.name, layer.out, layer.inp, changes[layer.name][1].shape[0], 1.0)
        for layer in first.layers
    )
    rank = max(layer.rank for layer in layers)
    return AdapterSpec(
        method="lora",
        rank=rank,
        alpha=float(rank),
        layers=layers,
        heads=first.heads,
        head_shapes=first.head_shapes,
        base_fingerprint=next(filter(None, (s.spec.base_fingerprint for s in sources)), ""),
        seed=seed,
        basis_digest=tensors_digest({}),
    )


def _distance(changes: Mapping[str, Pair], given: Given) -> float | None:
    off = total = 0.0
    for name, merged in changes.items():
        mean = stack(given.layers[name], given.weights)
        total += product_norm(*mean) ** 2
        off += product_norm(*difference(merged, mean)) ** 2
    return math.sqrt(off / total) if total else None
