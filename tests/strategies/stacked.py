"""Dense float64 references for strategies that work on the mean weight change."""

from dataclasses import replace

import torch

from fedlora.strategies.base import ClientInfo
from tests.server.cases import random_state
from tests.strategies.rounds import change, ended_with, update

CLIENTS = (("ann", 3.0), ("bob", 1.0), ("cyd", 7.5))


def clients(chosen, state, ranks=(None,) * 3, size=0.5, seed=0):
    """One update of each of three clients of these ranks."""
    return [
        update(chosen, state, name, seed + i, weight, rank, size)
        for i, ((name, weight), rank) in enumerate(zip(CLIENTS, ranks, strict=True))
    ]


def mean_of(updates):
    """layer -> T = sum_i p_i s B_i A_i (d, k), each client at its own rank."""
    total = sum(up.weight for up in updates)
    dense = [change(up.delta.spec, ended_with(up), {}) for up in updates]
    return {
        name: sum((up.weight / total) * d[name] for up, d in zip(updates, dense, strict=True))
        for name in dense[0]
    }


def mean_factor(updates, name):
    """sum_i p_i of one factor, float64; all clients of one rank."""
    total = sum(up.weight for up in updates)
    return sum((up.weight / total) * ended_with(up)[name] for up in updates)


def own(state):
    """layer -> s B A (d, k) of the state's adapter, without folds."""
    return change(state.spec, state.tensors, {})


def base_change(state):
    """layer -> sum of all folds (d, k)."""
    found = {
        layer.name: torch.zeros(layer.out, layer.inp, dtype=torch.float64)
        for layer in state.spec.layers
    }
    for name, left in state.tensors.items():
        if name.startswith("fold.") and name.endswith(".L"):
            layer = name.removesuffix(".L").split(".", 2)[2]
            found[layer] += left.double() @ state.tensors[f"{name.removesuffix('L')}Q"].double()
    return found


def step(chosen, state, updates):
    return chosen.refactor(state, chosen.reduce(state, updates))


def far(left, right):
    """Largest relative Frobenius distance over the layers."""
    return max(float((left[k] - right[k]).norm() / right[k].norm()) for k in right)


def from_start(state, seed=0):
    """The state before round 1: B = 0."""
    tensors = {k: v * 0 if k.endswith(".B") else v for k, v in state.tensors.items()}
    return replace(state, round=0, tensors=tensors)


def another(state, seed):
    """The same spec with other random tensors."""
    return replace(state, tensors=dict(random_state(state.spec, seed).tensors))


def given_to(chosen, state, rank):
    """(tensors, layer -> s B A) that a client of this rank starts from."""
    start = chosen.broadcast(state, ClientInfo("any", rank)).adapter
    return start.tensors, change(start.spec, start.tensors, {})
