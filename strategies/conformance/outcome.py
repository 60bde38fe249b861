"""Laws of the outcome: what comes of a round, held against the dense mean."""

from dataclasses import replace

import torch

from fedlora.adapter import LayerSpec
from fedlora.strategies.base import Strategy
from fedlora.strategies.conformance.federation import NAMES, WEIGHTS, Federation
from fedlora.strategies.conformance.law import Law, require
from fedlora.strategies.conformance.reference import distance, effect, ideal
from fedlora.strategies.conformance.rounds import EXACT, SUMS, finite, rounds, taken


def exact(federation: Federation) -> None:
    for strategy, state, updates in rounds(federation):
        wanted = ideal(federation, strategy, state, updates)
        found = effect(federation, strategy, federation.round(strategy, state, updates))
        gap, name = distance(found, wanted)
        require(
            gap <= EXACT,
            f"in round {state.round + 1}, {name} of the global adapter differs by {gap:.1e} "
            "(relative) from the weighted mean of what the clients ended with",
            f"at most {EXACT:g}, for the class declares exact = True",
        )


def summed(federation: Federation) -> None:
    for strategy, state, updates in rounds(federation):
        whole = strategy.reduce(state, updates)
        parts = [strategy.reduce(state, half) for half in (updates[:1], updates[1:])]
        require(
            not whole.stacks,
            "reduce returns stacks, which are no sum",
            "sums only, for the class declares linear = True",
        )
        for name, total in whole.sums.items():
            added = sum((part.sums[name] for part in parts), torch.zeros(()))
            gap, _ = distance({name: added}, {name: total})
            require(
                gap <= SUMS,
                f"the sums {name} of two groups of clients add up to another sum ({gap:.1e})",
                "the sum over all clients, for the class declares linear = True",
            )


def headed(federation: Federation) -> None:
    for strategy, state, updates in rounds(federation):
        sent = [n for n in federation.spec.head_shapes if n in updates[0].delta.tensors]
        wanted = ideal(federation, strategy, state, updates)
        found = effect(federation, strategy, federation.round(strategy, state, updates))
        gap, name = distance(found, {n: wanted[n] for n in sent})
        require(
            not sent or gap <= EXACT,
            f"{name} of the global adapter differs by {gap:.1e} (relative) from the weighted mean",
            "the weighted mean of the heads that clients sent",
        )


def agreed(federation: Federation) -> None:
    for strategy, state, _ in rounds(federation):
        one = federation.clients[0]
        same = [
            replace(federation.update(strategy, state, one, weight, seed="same"), client=name)
            for name, weight in zip(NAMES, WEIGHTS, strict=True)
        ]
        taken(federation, strategy, state, same, "when all clients send the same")


def still(federation: Federation) -> None:
    for strategy, state, _ in rounds(federation):
        updates = federation.cohort(strategy, state, size=0.0)
        new = federation.round(strategy, state, updates)
        finite(new, "when no client moves")
        gap, name = distance(effect(federation, strategy, new), effect(federation, strategy, state))
        require(
            gap <= EXACT,
            f"when no client moves, {name} changes by {gap:.1e} (relative)",
            "the same global adapter",
        )


def idle(federation: Federation) -> None:
    strategy = federation.strategy()
    for state in federation.walk():
        updates = federation.cohort(strategy, state)
        lazy = federation.cohort(strategy, state, size=0.0)[1]
        new = federation.round(strategy, state, [updates[0], lazy, *updates[2:]])
        finite(new, "when one client sends a change of zero")


def alive(federation: Federation) -> None:
    """Also after a round in which nobody moved, where the mean change is zero."""
    for strategy, state, updates in rounds(federation):
        for cohort in (federation.cohort(strategy, state, size=0.0), updates):
            new = federation.round(strategy, state, cohort)
            start = strategy.broadcast(new, federation.clients[0]).adapter
            for layer in start.spec.layers:
                dead = _dead(
                    layer, start.tensors[f"{layer.name}.B"], start.tensors[f"{layer.name}.A"]
                )
                require(
                    not dead,
                    f"slot {dead[:1]} of layer {layer.name} is zero in B and in A after round "
                    f"{new.round}",
                    "a row of A that is not zero, for such a slot never has a gradient again",
                )


def _dead(layer: LayerSpec, b: torch.Tensor, a: torch.Tensor) -> list[int]:
    zero = (b == 0).all(0) & (a == 0).all(1)  # (r,)
    return [slot for slot in range(layer.rank) if bool(zero[slot])]


def _is_exact(federation: Federation, strategy: Strategy) -> bool:
    return strategy.exact and not strategy.personal


def _is_linear(federation: Federation, strategy: Strategy) -> bool:
    return strategy.linear


def _equal_ranks(federation: Federation, strategy: Strategy) -> bool:
    """A client of smaller rank that does not move still takes the other slots for zero."""
    return len(set(federation.ranks)) == 1


def _has_slots(federation: Federation, strategy: Strategy) -> bool:
    return federation.method.product


OUTCOME = (
    Law(
        "exact",
        "The merged weight change is the weighted mean of the clients' changes.",
        "factors are averaged one by one (the mean of products is not the product of means), "
        "or the scale s is left out",
        "refactor, or the attribute exact",
        exact,
        _is_exact,
    ),
    Law(
        "linear",
        "The sums of two groups of clients add up to the sum of all.",
        "reduce normalises, clips or decomposes; do it in refactor, or declare linear = False",
        "reduce, or the attribute linear",
        summed,
        _is_linear,
    ),
    Law(
        "heads",
        "Heads are merged by weighted mean.",
        "only factors are put into the next state; self.head_sums(state, updates) has the rest",
        "reduce and refactor, for names without a layer",
        headed,
        waivable=True,
    ),
    Law(
        "same",
        "When all clients end with the same adapter, that is the next one.",
        "the scale s is left out or counted twice, A and B are swapped, or a step is damped",
        "refactor",
        agreed,
        waivable=True,
    ),
    Law(
        "still",
        "When no client moves, the global adapter stays.",
        "a mean change of zero (T = 0) is decomposed, or something is added every round",
        "refactor",
        still,
        _equal_ranks,
        waivable=True,
    ),
    Law(
        "idle",
        "A client whose change is zero does no harm.",
        "a division by the norm of an update",
        "divisions in reduce and refactor",
        idle,
    ),
    Law(
        "alive",
        "No rank slot is lost for good: B and A are never both zero in a slot.",
        "a product of lower rank than the adapter was decomposed; see fedlora.linalg.fill_dead",
        "refactor, after a decomposition",
        alive,
        _has_slots,
        waivable=True,
    ),
)
