"""Folds: changes of the frozen base that a strategy makes between rounds, W0 + sum_v L_v Q_v.

Each version is a low-rank pair per layer, kept beside the factors in the strategy's state
and sent to every client once, for parts of a broadcast are fetched by digest; a client that
was absent fetches all it has missed. Adding a pair to a bf16 weight in place would lose it
to rounding, so it stays a branch of its own, in float32.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from fedlora.adapter import AdapterSpec, AdapterState, Tensors
from fedlora.linalg import recompress, stack
from fedlora.messages import Pair

PREFIX = "fold."
MAX_VERSIONS = 16


def folds(tensors: Tensors) -> dict[str, dict[str, Tensor]]:
    """Version -> (layer + ".L" or ".Q" -> tensor), of a strategy's state."""
    found: dict[str, dict[str, Tensor]] = {}
    for name in sorted(tensors):
        if name.startswith(PREFIX):
            version, _, rest = name.removeprefix(PREFIX).partition(".")
            found.setdefault(version, {})[rest] = tensors[name]
    return found


def folded(tensors: Tensors, layer: str) -> Pair | None:
    """(L (d, rho), Q (rho, k)) of all versions together, float64; None without a version."""
    versions = folds(tensors).values()
    if not versions:
        return None
    left = torch.cat([version[f"{layer}.L"].double() for version in versions], 1)
    right = torch.cat([version[f"{layer}.Q"].double() for version in versions], 0)
    return left, right


def add_fold(
    tensors: Tensors, spec: AdapterSpec, version: int, pairs: Mapping[str, Pair]
) -> dict[str, Tensor]:
    """`tensors` with one more version; all are joined in one when they grow too large.

    Args:
        tensors: a strategy's state.
        spec: its adapter.
        version: number of the round that made it.
        pairs: layer -> (L (d, rho), Q (rho, k)).
    """
    new = dict(tensors)
    new.update(_named(version, pairs))
    versions = folds(new)
    too_large = any(
        sum(v[f"{layer.name}.L"].shape[1] for v in versions.values()) > min(layer.out, layer.inp)
        for layer in spec.layers
    )
    if len(versions) > MAX_VERSIONS or too_large:
        joined = {}
        for layer in spec.layers:
            pair = folded(new, layer.name)
            assert pair is not None
            joined[layer.name] = recompress(*pair)
        new = {name: t for name, t in new.items() if not name.startswith(PREFIX)}
        new.update(_named(version, joined))
    return new


def expanded(adapter: AdapterState, tensors: Mapping[str, Tensor]) -> AdapterState:
    """An s B A adapter and the folds in `tensors` as one LoRA of scale 1 and higher rank."""
    spec = adapter.spec
    joined = {name: adapter.tensors[name] for name in spec.head_shapes}
    layers = []
    for layer in spec.layers:
        own = (
            layer.scale * adapter.tensors[f"{layer.name}.B"].double(),
            adapter.tensors[f"{layer.name}.A"].double(),
        )
        fold = folded(tensors, layer.name)
        assert fold is not None
        left, right = stack([fold, own], [1.0, 1.0])
        if left.shape[1] > min(layer.out, layer.inp):
            left, right = recompress(left, right)
        layers.append(replace(layer, rank=left.shape[1], scale=1.0))
        joined[f"{layer.name}.B"] = left.float().contiguous()
        joined[f"{layer.name}.A"] = right.float().contiguous()
    rank = max(layer.rank for layer in layers)
    wide = replace(spec, method="lora", rank=rank, alpha=float(rank), layers=tuple(layers))
    return AdapterState(wide, dict(sorted(joined.items())))


def _named(version: int, pairs: Mapping[str, Pair]) -> dict[str, Tensor]:
    named = {}
    for layer, (left, right) in pairs.items():
        named[f"{PREFIX}{version:04d}.{layer}.L"] = left.float().contiguous()
        named[f"{PREFIX}{version:04d}.{layer}.Q"] = right.float().contiguous()
    return named
