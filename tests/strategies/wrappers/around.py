"""Wrapped strategies, crowds of clients, and the dense float64 view of what they sent."""

from dataclasses import replace

import torch

from fedlora.adapter import AdapterState
from fedlora.adapters import METHODS
from fedlora.linalg import truncate
from fedlora.strategies.base import Conditions, Stats, Strategy
from fedlora.strategies.wrappers import WRAPPERS
from tests.strategies.rounds import change, ended_with, make, update

PRODUCT = ("krum", "multi-krum", "geometric-median", "lodd")
ROBUST = ("coordinate-median", "trimmed-mean", *PRODUCT)


class Products(Strategy):
    """The mean weight change cut to the global rank: a strategy that never reads factors."""

    name = "products"
    exact = False
    linear = False
    hetero_rank = True
    needs = "product"
    regauges = True
    privacy = frozenset({"record", "client"})

    def factors(self, state):
        return ("A", "B")

    def reduce(self, state, updates):
        heads = self.head_sums(state, updates)
        weight = sum(u.weight for u in updates)
        return Stats(heads, weight, dict(self.stacks(state, updates).items()))

    def refactor(self, state, stats):
        tensors = dict(stats.mean())
        for layer in state.spec.layers:
            b, a, _ = truncate(*stats.stacks[layer.name], layer.rank)
            tensors[f"{layer.name}.B"], tensors[f"{layer.name}.A"] = b / layer.scale, a
        return self.advance(state, {k: v.float() for k, v in tensors.items()})


def wrapped(wrapper, strategy="fedit", method="lora", number=0, rank=2, options=None, **spec):
    """(wrapper around strategy, state, basis)."""
    if strategy == "products":
        _, state, basis = make("fedit", method, number, rank, **spec)
        chosen = Products(METHODS[method])
    else:
        chosen, state, basis = make(strategy, method, number, rank, **spec)
    return WRAPPERS[wrapper](chosen, options), state, basis


def crowd(chosen, state, n, size=0.5, seed=0, weights=None):
    """n clients with random updates, by name."""
    given = weights or [1.0 + i % 3 for i in range(n)]
    return [
        update(chosen, state, f"c{i:02d}", seed + i, weight=given[i], size=size) for i in range(n)
    ]


def scaled(up, factor):
    """`up` with its delta times a factor."""
    return replace(up, delta=up.delta.scaled(factor))


def moved(up, tensors):
    """`up` with other tensors as its delta."""
    return replace(up, delta=AdapterState(up.delta.spec, dict(tensors)))


def as_factors(up):
    """All of a delta in one vector."""
    return torch.cat([t.double().flatten() for _, t in sorted(up.delta.tensors.items())])


def as_products(up, basis):
    """The dense weight changes since the start, and the heads' deltas, in one vector."""
    spec = up.delta.spec
    start = {k: v.double() for k, v in up.start.tensors.items()}
    before, after = change(spec, start, basis), change(spec, ended_with(up), basis)
    parts = [(after[name] - before[name]).flatten() for name in sorted(after)]
    layers = {layer.name for layer in spec.layers}
    heads = [
        t.double().flatten()
        for name, t in sorted(up.delta.tensors.items())
        if name.rpartition(".")[0] not in layers
    ]
    return torch.cat(parts + heads)


def dense(up, basis, space):
    return as_factors(up) if space == "factor" else as_products(up, basis)


def squared(points):
    """(n, n) squared distances, one pair at a time."""
    n = len(points)
    return torch.stack(
        [torch.stack([((points[i] - points[j]) ** 2).sum() for j in range(n)]) for i in range(n)]
    )


def next_state(chosen, state, updates):
    return chosen.refactor(state, chosen.reduce(state, updates))


def step_of(state, new):
    """How far the global tensors moved, in one vector."""
    names = sorted(state.tensors)
    return torch.cat([(new.tensors[k] - state.tensors[k]).double().flatten() for k in names])


def check(chosen, state, n=12, ranks=None, **given):
    chosen.check(Conditions(state.spec, ranks or [state.spec.rank] * n, **given))
