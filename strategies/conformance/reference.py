"""The dense float64 reference: what clients ended with, their mean T, and what was applied.

Here, and only here, weight changes are formed as d x k matrices: the plain way, against
which a strategy's low-rank way is held.
"""

import math
from collections.abc import Mapping, Sequence

from torch import Tensor

from fedlora.adapter import AdapterSpec, AdapterState
from fedlora.messages import ClientUpdate
from fedlora.strategies.base import Strategy, StrategyState
from fedlora.strategies.conformance.federation import Federation
from fedlora.strategies.fold import folded

Effect = dict[str, Tensor]


def products_known(federation: Federation) -> bool:
    """Whether the weight change follows from the factors alone, so that T can be formed."""
    method, adapter = federation.method, federation.adapter
    layer = adapter.spec.layers[0]
    factors = {f: adapter.tensors[f"{layer.name}.{f}"] for f in method.factor_shapes(layer)}
    return method.lowrank(layer, factors, federation.basis) is not None


def effect(federation: Federation, strategy: Strategy, state: StrategyState) -> Effect:
    """What the global adapter does: layer -> weight change (d, k), and the heads, float64.

    The tensors themselves for a method whose change needs W0, and for a personal strategy,
    whose global adapter is not a model.
    """
    return adapter_effect(federation, strategy, strategy.global_delta(state))


def adapter_effect(federation: Federation, strategy: Strategy, adapter: AdapterState) -> Effect:
    """`effect` of an adapter."""
    if strategy.personal or not products_known(federation):
        return {name: tensor.double() for name, tensor in adapter.tensors.items()}
    return _changes(federation, adapter.spec, adapter.tensors)


def ended(
    federation: Federation, strategy: Strategy, state: StrategyState, update: ClientUpdate
) -> Effect:
    """What one client ended with, in the terms of `effect`: W0's folds are part of it."""
    tensors = {name: update.ended[name] for name in update.begin.tensors}
    if strategy.personal or not products_known(federation):
        return tensors
    changes = _changes(federation, update.delta.spec, tensors)
    for layer in state.spec.layers:
        if (fold := folded(state.tensors, layer.name)) is not None:
            changes[layer.name] = changes[layer.name] + fold[0] @ fold[1]
    return changes


def ideal(
    federation: Federation,
    strategy: Strategy,
    state: StrategyState,
    updates: Sequence[ClientUpdate],
) -> Effect:
    """T = sum_i p_i (what client i ended with), by layer, and the heads' mean."""
    total = sum(update.weight for update in updates)
    mean: Effect = {}
    for update in updates:
        for name, value in ended(federation, strategy, state, update).items():
            term = (update.weight / total) * value
            mean[name] = mean[name] + term if name in mean else term
    return mean


def distance(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> tuple[float, str]:
    """The largest relative difference of any tensor (Frobenius norms), and its name.

    A tensor that is expected to be nearly zero is compared with the largest one.
    """
    most = max((float(t.norm()) for t in expected.values()), default=0.0) or 1.0
    worst = (-1.0, "")
    for name, value in expected.items():
        if name not in found:
            return float("inf"), f"{name} (missing)"
        if found[name].shape != value.shape:
            return float("inf"), f"{name} (of shape {tuple(found[name].shape)})"
        scale = max(float(value.norm()), 1e-3 * most)
        gap = float((found[name].double() - value).norm()) / scale
        worst = max(worst, (gap if math.isfinite(gap) else math.inf, name))
    return worst


def _changes(federation: Federation, spec: AdapterSpec, tensors: Mapping[str, Tensor]) -> Effect:
    method = federation.methods[spec.method]
    changes = {name: tensors[name].double() for name in spec.head_shapes}
    for layer in spec.layers:
        factors = {f: tensors[f"{layer.name}.{f}"].double() for f in method.factor_shapes(layer)}
        pair = method.lowrank(layer, factors, federation.basis)
        assert pair is not None, "the caller has asked products_known"
        changes[layer.name] = pair[0] @ pair[1]  # (d, k)
    return changes
