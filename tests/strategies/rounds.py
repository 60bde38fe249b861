"""One round of a strategy by hand, in float64, and the dense reference it is held against."""

from dataclasses import replace

import torch

from fedlora.adapter import AdapterState, split_name, trained_shapes
from fedlora.adapters import METHODS
from fedlora.messages import ClientUpdate, RoundPlan
from fedlora.strategies import STRATEGIES
from fedlora.strategies.base import ClientInfo, Conditions
from tests.adapters import dense
from tests.server.cases import make_spec, randn, random_state, with_basis

BILINEAR = ("lora", "rslora", "pissa", "vera")
AFFINE = ("lora-xs", "miss", "bone-col", "bone-row")
PAIRS = [
    *(("fedit", method) for method in (*BILINEAR, *AFFINE, "dora")),
    *(("ffa-lora", method) for method in BILINEAR),
    *(("rolora", method) for method in BILINEAR),
]
NAMES = ("ann", "bob", "cyd", "dan")
WEIGHTS = (3.0, 1.0, 7.5, 2.0)


def make(strategy, method="lora", number=0, rank=2, **spec):
    """(strategy, state before round `number` + 1, basis) with random factors."""
    made, basis = with_basis(make_spec(method, rank, **spec))
    chosen = STRATEGIES[strategy](METHODS[method])
    state = chosen.init(random_state(made))
    return chosen, replace(state, round=number), basis


def expected(chosen, state, info):
    """Shapes of what the client must send in the next round."""
    plan = RoundPlan("run", state.round + 1, 0, info.name, (), info.rank, 1)
    return chosen.expect(state, chosen.plan(state, info, plan))


def update(chosen, state, name, seed, weight=1.0, rank=None, size=0.5):
    """A client that moved every planned tensor at random, with a float64 delta."""
    info = ClientInfo(name, rank or state.spec.rank)
    start = chosen.broadcast(state, info).adapter
    shapes = expected(chosen, state, info)
    delta = {
        k: size * randn(*v, seed=97 * seed + i, dtype=torch.float64)
        for i, (k, v) in enumerate(shapes.items())
    }
    return ClientUpdate(
        run="run",
        round=state.round + 1,
        attempt=0,
        client=name,
        start_sha256="",
        delta=AdapterState(start.spec, delta),
        num_examples=weight,
        start=start,
        weight=weight,
    )


def check(chosen, spec, ranks, **given):
    chosen.check(Conditions(spec, ranks, **given))


def cohort(chosen, state, ranks=(None,) * 4, weights=WEIGHTS):
    return [
        update(chosen, state, name, seed, weight, rank)
        for seed, (name, weight, rank) in enumerate(zip(NAMES, weights, ranks, strict=True))
    ]


def merged(chosen, state, updates):
    """The next global tensors before they are rounded to float32."""
    stats = chosen.reduce(state, updates)
    return {**{k: v.double() for k, v in state.tensors.items()}, **stats.mean()}


def ended_with(up):
    """All tensors of a client, float64, at its own rank."""
    return {**{k: v.double() for k, v in up.start.tensors.items()}, **up.trained}


def change(spec, tensors, basis):
    """layer -> dense weight change (d, k) of an adapter, by the papers' formulas."""
    changes = {}
    for i, layer in enumerate(spec.layers):
        factors = {
            split_name(name)[1]: t
            for name, t in tensors.items()
            if split_name(name)[0] == layer.name
        }
        weight = randn(layer.out, layer.inp, seed=900 + i, dtype=torch.float64)
        changes[layer.name] = dense.delta(spec.method, layer, weight, factors, basis)
    return changes


def mean_change(updates, basis):
    """T = sum_i p_i dW_i, layer by layer."""
    total = sum(up.weight for up in updates)
    parts = [(up.weight / total, change(up.delta.spec, ended_with(up), basis)) for up in updates]
    return {name: sum(p * c[name] for p, c in parts) for name in parts[0][1]}


def distance(left, right):
    """Largest difference, relative to the largest entry, over all tensors."""
    assert left.keys() == right.keys()
    scale = max(float(t.abs().max()) for t in right.values())
    return max(float((left[k].double() - right[k].double()).abs().max()) for k in left) / scale


def factor_names(spec, factor):
    names = trained_shapes(replace(spec, head_shapes={}), METHODS[spec.method], [factor])
    return list(names)
