"""Laws of form: what a strategy declares, sends, expects back and returns."""

import itertools
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import replace

from torch import Tensor

from fedlora.adapter import trained_shapes, with_rank
from fedlora.errors import AdapterError, ConfigError
from fedlora.messages import HEADS, Start
from fedlora.strategies.base import Conditions, Stats, Strategy, StrategyState
from fedlora.strategies.conformance.federation import MIXED, Federation, admit, expected_shapes
from fedlora.strategies.conformance.law import Law, require
from fedlora.strategies.conformance.reference import adapter_effect, distance, effect
from fedlora.strategies.conformance.soundness import json_safe, sound, whole
from fedlora.strategies.fold import folds
from fedlora.wire import encode_json, encode_tensors

NEEDS = ("any", "bilinear", "product")
UNITS = frozenset({"record", "client"})


def declared(federation: Federation) -> None:
    strategy = federation.unchecked()
    name = getattr(strategy, "name", None)
    require(isinstance(name, str) and bool(name), f"name = {name!r}", "a text")
    for key in ("exact", "linear", "hetero_rank", "regauges", "folds", "personal", "asynchronous"):
        value = getattr(strategy, key, None)
        require(isinstance(value, bool), f"{key} = {value!r}", "True or False")
    require(strategy.needs in NEEDS, f"needs = {strategy.needs!r}", " or ".join(NEEDS))
    units = strategy.privacy
    require(
        isinstance(units, frozenset) and units <= UNITS,
        f"privacy = {units!r}",
        'a frozenset of "record" and "client"',
    )
    try:
        encode_json(dict(strategy.options))
    except (TypeError, ValueError) as e:
        require(False, f"options = {strategy.options!r} ({e})", "JSON values by name")
    admit(federation, strategy)


def chosen(federation: Federation, states: Iterable[StrategyState]) -> None:
    for state in states:
        strategy = federation.strategy()
        known = federation.method.factor_shapes(state.spec.layers[0])
        for client in federation.clients:
            plan = federation.plan(strategy, state, client)
            odd = [name for name in plan.factors if name not in known]
            require(not odd, f"the plan trains {odd[:1]}", f"factors of {', '.join(known)}")
            odd = [n for n in plan.kept if n != HEADS and n not in plan.factors]
            require(not odd, f"the plan keeps {odd[:1]}", "a factor that is trained, or heads")
            # a client's rank may be a budget of slots in an adapter that all hold whole
            most = state.spec.rank if strategy.budgets else client.rank
            require(
                1 <= plan.rank <= most,
                f"the plan gives {client.name} rank {plan.rank}",
                f"1 to {most}, which it can hold",
            )


def begun(federation: Federation) -> None:
    strategy = federation.strategy()
    state = strategy.init(federation.adapter)
    require(state.round == 0, f"init returned round {state.round}", "round 0")
    require(state.spec == federation.spec, "init changed the spec", "the adapter's spec")
    before = adapter_effect(federation, strategy, federation.adapter)
    gap, name = distance(effect(federation, strategy, state), before)
    require(gap <= 1e-6, f"init changed {name} by {gap:.1e} (relative)", "the adapter as given")


def sent(federation: Federation, states: Iterable[StrategyState]) -> None:
    for state in states:
        strategy = federation.strategy()
        made: dict[Hashable, Start] = {}
        for client in federation.clients:
            plan = federation.plan(strategy, state, client)
            start = strategy.broadcast(state, client)
            spec = with_rank(state.spec, plan.rank)
            require(
                start.adapter.spec == spec,
                f"{client.name}'s start has another spec",
                f"the global spec at the plan's rank {plan.rank}",
            )
            whole(start.adapter.tensors, trained_shapes(spec, federation.method), "the start")
            for version, fold in start.fold.items():
                ranks = {n: t.shape[1] for n, t in fold.items() if n.endswith(".L")}
                shapes: dict[str, tuple[int, ...]] = {}
                for layer in spec.layers:
                    rho = ranks.get(f"{layer.name}.L", 0)
                    shapes[f"{layer.name}.L"] = (layer.out, rho)
                    shapes[f"{layer.name}.Q"] = (rho, layer.inp)
                whole(fold, shapes, f"fold {version}")
            if plan.control:
                wanted = expected_shapes(strategy, state, replace(plan, control=False))
                whole(start.control, wanted, "the control variates")
            key = strategy.broadcast_key(state, client)
            first = made.setdefault(key, start)
            require(
                _bits(_all(first)) == _bits(_all(start)),
                f"{client.name} gets other tensors than another client with key {key!r}",
                "equal tensors for equal broadcast_key",
            )


def awaited(federation: Federation, states: Iterable[StrategyState]) -> None:
    for state in states:
        strategy = federation.strategy()
        for client in federation.clients:
            plan = federation.plan(strategy, state, client)
            found = dict(strategy.expect(state, plan))
            wanted = expected_shapes(strategy, state, plan)
            for name in sorted(found.keys() ^ wanted.keys()):
                side = "more" if name in found else "less"
                require(False, f"expect has {name} {side}", "the planned factors and the heads")
            for name, shape in wanted.items():
                require(tuple(found[name]) == shape, f"expect has {name} {found[name]}", f"{shape}")


def advanced(federation: Federation) -> None:
    strategy = federation.strategy()
    state = strategy.init(federation.adapter)
    for _ in range(3):
        stats = strategy.reduce(state, federation.cohort(strategy, state))
        require(isinstance(stats, Stats), f"reduce returned a {type(stats).__name__}", "a Stats")
        json_safe(stats.notes, "the notes of reduce")
        new = strategy.refactor(state, stats)
        require(
            isinstance(new, StrategyState),
            f"refactor returned a {type(new).__name__}",
            "a StrategyState (self.advance makes one)",
        )
        require(
            new.round == state.round + 1,
            f"round {new.round} follows round {state.round}",
            f"{state.round + 1}",
        )
        require(new.spec == state.spec, "refactor changed the spec", "the same spec")
        require(
            strategy.folds or not folds(new.tensors),
            "the next state holds a fold of the base, and folds = False",
            "folds = True for a strategy that changes the base",
        )
        names = {n for n in trained_shapes(state.spec, federation.method) if n in state.tensors}
        lost = sorted(names - new.tensors.keys())
        require(not lost, f"the next state lacks {lost[:1]}", "every factor and head")
        for name, tensor in new.tensors.items():
            sound(name, tensor, "the next state")
            if name in names:
                shape = tuple(state.tensors[name].shape)
                require(
                    tuple(tensor.shape) == shape,
                    f"{name} has shape {tuple(tensor.shape)} in the next state",
                    f"{shape}",
                )
        encode_tensors(new.tensors)
        json_safe(new.extra, "extra")
        state = new


def merged(federation: Federation) -> None:
    for state in federation.walk():
        found = federation.strategy().global_delta(state)
        spec = found.spec
        require(
            spec.head_shapes == state.spec.head_shapes
            and [(x.name, x.out, x.inp) for x in spec.layers]
            == [(x.name, x.out, x.inp) for x in state.spec.layers],
            "global_delta has other layers or heads",
            "those of the state's spec, at any rank",
        )
        shapes = trained_shapes(spec, federation.methods[spec.method])
        whole(found.tensors, shapes, "the global adapter")


def ranked(federation: Federation) -> None:
    strategy = federation.unchecked()
    given = Conditions(federation.spec, MIXED)
    try:
        strategy.check(given)
    except (ConfigError, AdapterError):
        return
    require(
        strategy.hetero_rank,
        f"check takes clients of ranks {MIXED}, but hetero_rank = False",
        "a ConfigError before round 1",
    )


def _all(start: Start) -> dict[str, Tensor]:
    folds = {f"{v}/{n}": t for v, fold in start.fold.items() for n, t in fold.items()}
    control = {f"control/{n}": t for n, t in start.control.items()}
    return {**start.adapter.tensors, **folds, **control}


def _bits(tensors: Mapping[str, Tensor]) -> Iterable[tuple[str, bytes]]:
    return [(n, t.contiguous().numpy().tobytes()) for n, t in sorted(tensors.items())]


def _equal_ranks(federation: Federation, strategy: Strategy) -> bool:
    return len(set(federation.ranks)) == 1


StateCheck = Callable[[Federation, Iterable[StrategyState]], None]


def at_start(check: StateCheck) -> Callable[[Federation], None]:
    """The check before round 1, without which no round can be tried."""
    return lambda federation: check(federation, itertools.islice(federation.walk(), 1))


def later(law: Law, check: StateCheck) -> Law:
    """The same law in the rounds after."""
    return replace(law, run=lambda federation: check(federation, federation.walk()))


PLAN = Law(
    "plan",
    "Clients train factors that the method has, at a rank that they can hold.",
    "a factor's name is misspelt, or a rank is not clipped to client.rank",
    "factors, rank and plan",
    at_start(chosen),
    gate=True,
)
BROADCAST = Law(
    "broadcast",
    "A client's start has every tensor of its spec: right shape, float32, finite.",
    "the start is cut to another rank than the plan's, or depends on more than its key",
    "broadcast, broadcast_key and rank",
    at_start(sent),
    gate=True,
)
EXPECT = Law(
    "expect",
    "What must come back is what the plan trains and does not keep, and the heads.",
    "expect and factors (or plan) do not say the same",
    "expect; leave it out, and it follows from the plan",
    at_start(awaited),
    gate=True,
)

PROTOCOL = (
    Law(
        "declared",
        "A strategy says by its class attributes what it can do.",
        "an attribute was left out or has another type",
        "the class attributes name, exact, linear, hetero_rank, needs, privacy, options",
        declared,
        gate=True,
    ),
    Law(
        "init",
        "Before round 1 the global adapter is the one the run starts from.",
        "init replaces or rescales factors",
        "init and global_delta",
        begun,
    ),
    PLAN,
    BROADCAST,
    EXPECT,
    Law(
        "next-state",
        "Each round makes one complete state: round + 1, all tensors, float32, finite.",
        "a tensor was left in float64, divided by zero, dropped, or the round counted twice; "
        "self.advance(state, tensors) does all of it",
        "reduce and refactor",
        advanced,
        gate=True,
    ),
    later(PLAN, chosen),
    later(BROADCAST, sent),
    later(EXPECT, awaited),
    Law(
        "global-adapter",
        "The global adapter can be used: every tensor of its spec, float32, finite.",
        "further tensors of the state get into it, or a rank in its spec is wrong",
        "global_delta; self.adapter(state) has factors and heads only",
        merged,
        gate=True,
    ),
    Law(
        "ranks",
        "Unequal ranks are refused before round 1 unless hetero_rank is declared.",
        "check was overridden without calling super().check(given)",
        "check and hetero_rank",
        ranked,
        _equal_ranks,
    ),
)
