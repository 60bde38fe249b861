"""Laws of the mean: whose updates count, by how much, and what comes of them."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from fedlora.adapter import LayerSpec
from fedlora.messages import ClientUpdate
from fedlora.strategies.base import Strategy, StrategyState
from fedlora.strategies.conformance.federation import NAMES, Federation
from fedlora.strategies.conformance.law import Law, require
from fedlora.strategies.conformance.reference import distance, effect, ended, ideal

# what two orders of a float64 sum may differ by after rounding to float32 once
SAME = 1e-7
# float32 factors: rounding of each times the number of terms of a product
EXACT = 1e-5
SUMS = 1e-10


def ordered(federation: Federation) -> None:
    for strategy, state, updates in _rounds(federation):
        turned = [
            replace(update, client=name)
            for update, name in zip(updates, (*NAMES[2:], *NAMES[:2]), strict=True)
        ]
        turned.sort(key=lambda update: update.client)
        what = "when clients swap their updates, {} changes by {:.1e} (relative)"
        _compare(federation, strategy, state, turned, updates, what)


def relative(federation: Federation) -> None:
    for strategy, state, updates in _rounds(federation):
        for factor in (0.3, 1000.0):
            scaled = [replace(update, weight=factor * update.weight) for update in updates]
            what = f"when all weights are {factor:g} times as large, {{}} changes by {{:.1e}}"
            _compare(federation, strategy, state, scaled, updates, what)


def weightless(federation: Federation) -> None:
    for strategy, state, updates in _rounds(federation):
        client = federation.clients[0]
        stranger = federation.update(strategy, state, client, 0.0, seed="zoe")
        more = [*updates, replace(stranger, client="zoe")]
        what = "a client of weight zero changes {} by {:.1e} (relative)"
        _compare(federation, strategy, state, more, updates, what)


def divided(federation: Federation) -> None:
    for strategy, state, updates in _rounds(federation):
        half = replace(updates[2], weight=updates[2].weight / 2)
        halves = [*updates[:2], half, replace(half, client="cyd-2"), updates[3]]
        what = "when a client is split into two halves, {} changes by {:.1e} (relative)"
        _compare(federation, strategy, state, halves, updates, what)


def exact(federation: Federation) -> None:
    for strategy, state, updates in _rounds(federation):
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
    for strategy, state, updates in _rounds(federation):
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
    for strategy, state, updates in _rounds(federation):
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
    for strategy, state, _ in _rounds(federation):
        one = federation.clients[0]
        same = [
            replace(federation.update(strategy, state, one, weight, seed="same"), client=name)
            for name, weight in zip(NAMES, (3.0, 1.0, 7.5, 2.0), strict=True)
        ]
        _taken(federation, strategy, state, same, "when all clients send the same")


def alone(federation: Federation) -> None:
    for strategy, state, updates in _rounds(federation):
        if updates[0].delta.spec.rank == state.spec.rank:
            _taken(federation, strategy, state, updates[:1], "when only one client takes part")


def still(federation: Federation) -> None:
    for strategy, state, _ in _rounds(federation):
        updates = federation.cohort(strategy, state, size=0.0)
        new = federation.round(strategy, state, updates)
        _finite(new, "when no client moves")
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
        _finite(new, "when one client sends a change of zero")


def alive(federation: Federation) -> None:
    """Also after a round in which nobody moved, where the mean change is zero."""
    for strategy, state, updates in _rounds(federation):
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


def absent(federation: Federation) -> None:
    strategy = federation.strategy()
    state = strategy.init(federation.adapter)
    for only in ("ann cyd", "bob", "bob cyd dan", "dan", "ann bob cyd dan"):
        updates = federation.cohort(strategy, state, only=only)
        new = federation.round(strategy, state, updates)
        _finite(new, f"when {only} take part")
        if strategy.exact and not strategy.personal:
            wanted = ideal(federation, strategy, state, updates)
            gap, name = distance(effect(federation, strategy, new), wanted)
            require(
                gap <= EXACT,
                f"when only {only} take part, {name} differs by {gap:.1e} (relative) from their "
                "weighted mean",
                "the mean over those who took part",
            )
        state = new


Round = tuple[Strategy, StrategyState, list[ClientUpdate]]


def _rounds(federation: Federation) -> list[Round]:
    """A new strategy, the state before each of the first rounds, and what clients send."""
    rounds = []
    for state in federation.walk():
        strategy = federation.strategy()
        rounds.append((strategy, state, federation.cohort(strategy, state)))
    return rounds


def _compare(
    federation: Federation,
    strategy: Strategy,
    state: StrategyState,
    other: Sequence[ClientUpdate],
    updates: Sequence[ClientUpdate],
    what: str,
) -> None:
    wanted = effect(federation, strategy, federation.round(strategy, state, updates))
    found = effect(federation, strategy, federation.round(strategy, state, other))
    gap, name = distance(found, wanted)
    require(gap <= SAME, what.format(name, gap), f"no change beyond rounding ({SAME:g})")
    if strategy.linear:
        means = [dict(strategy.reduce(state, group).mean()) for group in (other, updates)]
        gap, name = distance(*means)
        require(gap <= SUMS, what.format(f"the mean of {name}", gap), f"at most {SUMS:g}")


def _taken(
    federation: Federation,
    strategy: Strategy,
    state: StrategyState,
    updates: Sequence[ClientUpdate],
    when: str,
) -> None:
    wanted = ended(federation, strategy, state, updates[0])
    found = effect(federation, strategy, federation.round(strategy, state, updates))
    gap, name = distance(found, wanted)
    require(
        gap <= EXACT,
        f"{when}, {name} of the global adapter differs by {gap:.1e} (relative) from it",
        "what that client ended with",
    )


def _finite(state: StrategyState, when: str) -> None:
    for name, tensor in state.tensors.items():
        finite = bool(torch.isfinite(tensor).all())
        require(finite, f"{when}, {name} is not finite", "finite numbers")


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


MEAN = (
    Law(
        "order",
        "Which client holds which update does not matter.",
        "the first or last update of the list is treated in another way than the rest",
        "loops over updates in reduce",
        ordered,
        waivable=True,
    ),
    Law(
        "weights",
        "Only the ratios of the weights count.",
        "a sum of weighted terms is divided by the number of clients, or not at all",
        "where reduce or refactor divides; stats.mean() divides by the sum of the weights",
        relative,
        waivable=True,
    ),
    Law(
        "zero-weight",
        "A client of weight zero changes nothing.",
        "update.weight is not used, or len(updates) is",
        "reduce, for a term without update.weight",
        weightless,
        waivable=True,
    ),
    Law(
        "split",
        "A client split into two halves of its weight changes nothing.",
        "clients are counted where weights should be; medians and the like do so by design",
        "reduce, for len(updates); or declare it in waives",
        divided,
        waivable=True,
    ),
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
        "alone",
        "When only one client takes part, its adapter is the next one.",
        "weights are not divided by the sum over those who took part",
        "reduce and refactor",
        alone,
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
    Law(
        "absent",
        "Any part of the clients can make a round, a single one included.",
        "all clients are taken to be there, or those of the round before",
        "reduce, for client names and lengths",
        absent,
        waivable=True,
    ),
)
