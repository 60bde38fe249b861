"""How far the merged adapter is from the mean of what the clients trained.

    || sum_i p_i dW_i - dW ||_F / || sum_i p_i dW_i ||_F     over all adapted layers

with dW_i the weight change of client i and dW that of the new global adapter. Layers are
visited one at a time and tensors are read from the spool, so memory is bounded: the
stacked factors of one layer while they fit, else row blocks of the product.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedlora.adapter import AdapterSpec, LayerSpec, Tensors
from fedlora.adapters.base import Basis, Method
from fedlora.linalg import product_norm, stack

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
    spec: AdapterSpec,
    basis: Basis,
    clients: Sequence[Trained],
    applied: Tensors,
) -> float | None:
    """The relative error; None when the method's change needs W0 and is not affine.

    For an affine method whose change needs W0 (Bone), the same ratio in the space of its
    factors: the change is linear in them, so one is zero exactly when the other is.

    Args:
        clients: weights sum to 1.
        applied: tensors of the new global adapter.
    """
    error = ideal = 0.0
    for index, layer in enumerate(spec.layers):
        factors = {f: applied[f"{layer.name}.{f}"] for f in method.factor_shapes(layer)}
        merged = method.lowrank(layer, factors, basis)
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
        rank = sum(c.spec.layers[index].rank for c in clients) + merged[0].shape[1]
        # beyond this the product is smaller than its factors, and cheaper than their QR
        if rank * (layer.out + layer.inp) <= min(BUDGET_ELEMENTS, layer.out * layer.inp):
            squares = _stacked(method, basis, clients, index, merged)
        else:
            squares = _row_blocks(method, basis, clients, index, layer, merged)
        error += squares[0]
        ideal += squares[1]
    if ideal == 0.0:
        return 0.0 if error == 0.0 else math.inf
    return math.sqrt(error / ideal)


def _stacked(
    method: Method,
    basis: Basis,
    clients: Sequence[Trained],
    index: int,
    merged: tuple[Tensor, Tensor],
) -> tuple[float, float]:
    pairs = [_lowrank(method, basis, c, index) for c in clients]
    left, right = stack([*pairs, merged], [*(c.weight for c in clients), -1.0])
    del pairs  # as large as the stack itself
    rank = right.shape[0] - merged[1].shape[0]
    ideal = product_norm(left[:, :rank], right[:rank])
    error = product_norm(left, right)
    return error**2, ideal**2


def _row_blocks(
    method: Method,
    basis: Basis,
    clients: Sequence[Trained],
    index: int,
    layer: LayerSpec,
    merged: tuple[Tensor, Tensor],
) -> tuple[float, float]:
    rows = max(1, BUDGET_ELEMENTS // layer.inp)
    error = ideal = 0.0
    for first in range(0, layer.out, rows):
        block = slice(first, min(first + rows, layer.out))
        mean = torch.zeros(block.stop - block.start, layer.inp, dtype=torch.float64)
        for client in clients:
            left, right = _lowrank(method, basis, client, index)
            mean.addmm_(left[block].double(), right.double(), alpha=client.weight)
        ideal += float((mean**2).sum())
        mean.addmm_(merged[0][block].double(), merged[1].double(), alpha=-1.0)
        error += float((mean**2).sum())
    return error, ideal


def _lowrank(method: Method, basis: Basis, client: Trained, index: int) -> tuple[Tensor, Tensor]:
    small = client.spec.layers[index]
    pair = method.lowrank(small, client.read(small), basis)
    assert pair is not None
    return pair
