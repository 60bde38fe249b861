"""How far the merged adapter is from the mean of what the clients trained.

    || sum_i p_i dW_i - dW ||_F / || sum_i p_i dW_i ||_F     over all adapted layers

with dW_i the weight change of client i and dW that of the new global adapter. Layers are
visited one at a time and tensors are read from the spool, so memory is bounded: the
stacked factors of one layer while they fit, else row blocks of the product.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedlora.adapter import AdapterSpec, AdapterState, LayerSpec
from fedlora.adapters import METHODS
from fedlora.adapters.base import Basis, Method
from fedlora.linalg import product_norm, stack
from fedlora.messages import Pair

BUDGET_ELEMENTS = 4 * 2**20


@dataclass(frozen=True)
class Trained:
    """One client's contribution: weight p_i, the spec it holds, and its factors by layer.

    `read` takes a layer of `spec`.
    """

    weight: float
    spec: AdapterSpec
    read: Callable[[LayerSpec], Mapping[str, Tensor]]


def aggregation_error(
    method: Method,
    basis: Basis,
    clients: Sequence[Trained],
    applied: AdapterState,
    fold: Callable[[str], Pair | None],
) -> float | None:
    """The relative error; None when the method's change needs W0 and is not affine.

    For an affine method whose change needs W0 (Bone), the same ratio in the space of its
    factors: the change is linear in them, so one is zero exactly when the other is.

    Args:
        method, basis: of the clients' adapters.
        clients: weights sum to 1.
        applied: the new global adapter, relative to the original base.
        fold: layer -> the change of the base (d, rho), (rho, k) that all clients stood on.
    """
    error = ideal = 0.0
    # folds are expanded into a LoRA, whatever the clients train
    owner = method if applied.spec.method == method.name else METHODS[applied.spec.method]
    for index, layer in enumerate(applied.spec.layers):
        factors = {f: applied.tensors[f"{layer.name}.{f}"] for f in owner.factor_shapes(layer)}
        merged = owner.lowrank(layer, factors, basis)
        if merged is None:
            if not method.affine:
                return None
            means = {
                f: sum(c.weight * c.read(c.spec.layers[index])[f].double() for c in clients)
                for f in factors
            }
            error += sum(float(((means[f] - factors[f]) ** 2).sum()) for f in factors)
            ideal += sum(float((torch.as_tensor(means[f]) ** 2).sum()) for f in factors)
            continue
        terms = _Terms(method, basis, clients, index, fold(layer.name))
        rank = sum(c.spec.layers[index].rank for c in clients) + 2 * merged[0].shape[1]
        # beyond this the product is smaller than its factors, and cheaper than their QR
        if rank * (layer.out + layer.inp) <= min(BUDGET_ELEMENTS, layer.out * layer.inp):
            squares = _stacked(terms, merged)
        else:
            squares = _row_blocks(terms, layer, merged)
        error += squares[0]
        ideal += squares[1]
    if ideal == 0.0:
        return 0.0 if error == 0.0 else math.inf
    return math.sqrt(error / ideal)


@dataclass(frozen=True)
class _Terms:
    """What the mean weight change of one layer is the sum of, each read when it is needed."""

    method: Method
    basis: Basis
    clients: Sequence[Trained]
    index: int
    fold: Pair | None

    def __iter__(self) -> Iterator[tuple[float, Pair]]:
        for client in self.clients:
            small = client.spec.layers[self.index]
            pair = self.method.lowrank(small, client.read(small), self.basis)
            assert pair is not None
            yield client.weight, pair
        if self.fold is not None:
            yield 1.0, self.fold


def _stacked(terms: _Terms, merged: Pair) -> tuple[float, float]:
    weights, pairs = zip(*terms, strict=True)
    left, right = stack([*pairs, merged], [*weights, -1.0])
    del pairs  # as large as the stack itself
    rank = right.shape[0] - merged[1].shape[0]
    ideal = product_norm(left[:, :rank], right[:rank])
    error = product_norm(left, right)
    return error**2, ideal**2


def _row_blocks(terms: _Terms, layer: LayerSpec, merged: Pair) -> tuple[float, float]:
    rows = max(1, BUDGET_ELEMENTS // layer.inp)
    error = ideal = 0.0
    for first in range(0, layer.out, rows):
        block = slice(first, min(first + rows, layer.out))
        mean = torch.zeros(block.stop - block.start, layer.inp, dtype=torch.float64)
        for weight, (left, right) in terms:
            mean.addmm_(left[block].double(), right.double(), alpha=weight)
        ideal += float((mean**2).sum())
        mean.addmm_(merged[0][block].double(), merged[1].double(), alpha=-1.0)
        error += float((mean**2).sum())
    return error, ideal
