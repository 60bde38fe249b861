"""Laws of counting: whose updates count, and by how much."""

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from fedlora.messages import CONTROL, ClientUpdate
from fedlora.strategies.base import Stats, Strategy, StrategyState
from fedlora.strategies.conformance.federation import NAMES, Federation
from fedlora.strategies.conformance.law import Law, require
from fedlora.strategies.conformance.reference import distance, effect, ideal
from fedlora.strategies.conformance.rounds import EXACT, SAME, SUMS, finite, rounds, taken


def ordered(federation: Federation) -> None:
    for strategy, state, updates in rounds(federation):
        turned = [
            replace(update, client=name)
            for update, name in zip(updates, (*NAMES[2:], *NAMES[:2]), strict=True)
        ]
        turned.sort(key=lambda update: update.client)
        what = "when clients swap their updates, {} changes by {:.1e} (relative)"
        _compare(federation, strategy, state, turned, updates, what)


def relative(federation: Federation) -> None:
    for strategy, state, updates in rounds(federation):
        for factor in (0.3, 1000.0):
            scaled = [replace(update, weight=factor * update.weight) for update in updates]
            what = f"when all weights are {factor:g} times as large, {{}} changes by {{:.1e}}"
            _compare(federation, strategy, state, scaled, updates, what)


def weightless(federation: Federation) -> None:
    for strategy, state, updates in rounds(federation):
        client = federation.clients[0]
        stranger = federation.update(strategy, state, client, 0.0, seed="zoe")
        more = [*updates, replace(stranger, client="zoe")]
        what = "a client of weight zero changes {} by {:.1e} (relative)"
        _compare(federation, strategy, state, more, updates, what)


def divided(federation: Federation) -> None:
    for strategy, state, updates in rounds(federation):
        half = replace(updates[2], weight=updates[2].weight / 2)
        halves = [*updates[:2], half, replace(half, client="cyd-2"), updates[3]]
        what = "when a client is split into two halves, {} changes by {:.1e} (relative)"
        _compare(federation, strategy, state, halves, updates, what)


def alone(federation: Federation) -> None:
    for strategy, state, updates in rounds(federation):
        if updates[0].delta.spec.rank == state.spec.rank:
            taken(federation, strategy, state, updates[:1], "when only one client takes part")


def absent(federation: Federation) -> None:
    strategy = federation.strategy()
    state = strategy.init(federation.adapter)
    for only in ("ann cyd", "bob", "bob cyd dan", "dan", "ann bob cyd dan"):
        updates = federation.cohort(strategy, state, only=only)
        new = federation.round(strategy, state, updates)
        finite(new, f"when {only} take part")
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
        means = [_means(strategy.reduce(state, group)) for group in (other, updates)]
        gap, name = distance(*means)
        require(gap <= SUMS, what.format(f"the mean of {name}", gap), f"at most {SUMS:g}")


def _means(stats: Stats) -> dict[str, Tensor]:
    """Weighted means; control variates are summed over clients, so that weights leave theirs."""
    means = stats.mean()
    return {k: t if k.startswith(CONTROL) else means[k] for k, t in stats.sums.items()}


COUNTING = (
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
        "alone",
        "When only one client takes part, its adapter is the next one.",
        "weights are not divided by the sum over those who took part",
        "reduce and refactor",
        alone,
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
