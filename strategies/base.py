"""Strategy: how clients' adapters become the next global adapter.

A strategy is a set of pure functions over an explicit state that can be written to disk:

    init -> (plan, broadcast, expect) per client -> reduce -> refactor -> ...

`reduce` takes the updates in and leaves sums, or the weighted mean product as a stack;
`refactor` turns these into the next state. Neither changes its inputs, and neither forms
the product of two factors.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from fedlora.adapter import (
    AdapterSpec,
    AdapterState,
    MethodTraits,
    split_name,
    trained_shapes,
    with_rank,
)
from fedlora.errors import AdapterError, ConfigError
from fedlora.messages import HEADS, ClientUpdate, LazyTensors, Pair, RoundPlan, Start
from fedlora.strategies.fold import expanded, folds
from fedlora.strategies.options import checked_options
from fedlora.strategies.state import (
    ClientInfo,
    Conditions,
    PrivacyUnit,
    Stacks,
    Stats,
    StrategyState,
    Updates,
)

__all__ = [
    "ClientInfo",
    "Conditions",
    "Needs",
    "PrivacyUnit",
    "Stacks",
    "Stats",
    "Strategy",
    "StrategyState",
    "Updates",
    "bilinear",
    "checked_options",
    "cut",
]

Needs = Literal["any", "bilinear", "product"]


class Strategy(ABC):
    """One way to merge clients' adapters.

    Attributes:
        name: as in `federation.strategy`.
        exact: the merged weight change equals the weighted mean of the clients' changes.
        linear: the merge is one weighted sum, so that secure sums and central noise apply.
        hetero_rank: clients may hold different ranks.
        needs: what the adapter method must offer: "any", "bilinear" (linear in each of two
            factors), or "product" (the change is s B A and nothing else).
        regauges: factors are made anew between rounds, so that what clients or the server
            remember of the old ones (moments, control variates, error feedback) means
            nothing.
        folds: a part of every merge goes into the base, beside the factors.
        personal: a part of the adapter stays at each client; there is no global model.
        budgets: every client holds the whole adapter; its rank says how many slots per layer,
            on average, it may train.
        asynchronous: updates of earlier versions can be merged.
        privacy: units of differential privacy whose guarantee the algebra keeps.
        waives: law of `fedlora.strategies.conformance` -> why the strategy does not keep it by
            design, e.g. {"split": "a median counts clients, not their weights"}.
        options: option name -> default.

    Args:
        traits: the adapter method.
        options: from `federation.strategy_options`.

    Raises:
        ConfigError: an unknown option, or a value of another type than the default.
    """

    # set by the class, or by a wrapper on itself
    name: str
    exact: bool
    linear: bool
    hetero_rank: bool
    needs: Needs = "any"
    regauges: bool = False
    folds: bool = False
    personal: bool = False
    budgets: bool = False
    asynchronous: bool = False
    privacy: frozenset[PrivacyUnit] = frozenset({"record"})
    waives: Mapping[str, str] = {}
    options: ClassVar[Mapping[str, Any]] = {}

    def __init__(self, traits: MethodTraits, options: Mapping[str, Any] | None = None) -> None:
        self.traits = traits
        self.settings = checked_options(
            "federation.strategy_options", f"strategy {self.name!r}", options or {}, self.options
        )

    def check(self, given: Conditions) -> None:
        """Refuses, before round 1, what the strategy cannot merge.

        Raises:
            ConfigError: with the reason and what to choose instead.
        """
        self.check_method()
        spec = given.spec
        odd = sorted({rank for rank in given.ranks if rank != spec.rank})
        if odd and not self.hetero_rank:
            raise ConfigError(
                f"strategy {self.name!r} needs equal ranks, but clients have ranks "
                f"{sorted({*odd, spec.rank})}; give all clients rank {spec.rank}"
                f"{self._or_choose(lambda other: other._merges_ranks(self.traits, spec, odd))}"
            )
        if why := self._rank_misfit(self.traits, spec, odd, exact=self.exact):
            raise ConfigError(
                f"strategy {self.name!r} {why}; give all clients rank {spec.rank}, or choose "
                "method lora"
            )
        if self.regauges and given.optimizer_state == "keep":
            raise ConfigError(
                f'training.optimizer_state = "keep" does not fit strategy {self.name!r}, which '
                "makes the factors anew between rounds, so that old moments mean nothing; choose "
                '"reset"'
            )
        if given.privacy is not None and given.privacy not in self.privacy:
            allowed = ", ".join(sorted(self.privacy)) or "none"
            raise ConfigError(
                f'privacy.unit = "{given.privacy}" is voided by strategy {self.name!r} (it keeps '
                f"the guarantee of: {allowed}); train without it"
                f"{self._or_choose(lambda other: given.privacy in other.privacy)}"
            )
        if given.asynchronous and not self.asynchronous:
            raise ConfigError(
                f'federation.mode = "async" does not fit strategy {self.name!r}, which cannot '
                'merge updates of earlier versions; choose "sync"'
                f"{self._or_choose(lambda other: other.asynchronous)}"
            )

    def init(self, adapter: AdapterState) -> StrategyState:
        """The state before round 1."""
        return StrategyState(adapter.spec, 0, dict(adapter.tensors))

    @abstractmethod
    def factors(self, state: StrategyState) -> tuple[str, ...]:
        """Names of the factors that clients train in the next round."""

    def rank(self, state: StrategyState, client: ClientInfo) -> int:
        """The rank a client holds in the next round."""
        return client.rank

    def plan(self, state: StrategyState, client: ClientInfo, plan: RoundPlan) -> RoundPlan:
        """What a client does in the next round.

        Args:
            plan: filled in by the round loop but for factors and rank.
        """
        return replace(plan, factors=self.factors(state), rank=self.rank(state, client))

    def broadcast_key(self, state: StrategyState, client: ClientInfo) -> Hashable:
        """Clients with equal keys receive the same `broadcast`, which is made once."""
        return self.rank(state, client)

    def broadcast(self, state: StrategyState, client: ClientInfo) -> Start:
        """What a client with this key starts the next round from."""
        adapter = cut(self.adapter(state), self.rank(state, client), self.traits)
        return Start(adapter, folds(state.tensors))

    def expect(self, state: StrategyState, plan: RoundPlan) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor that must come back for a plan."""
        spec = with_rank(state.spec, plan.rank)
        if HEADS in plan.kept:
            spec = replace(spec, head_shapes={})
        return trained_shapes(spec, self.traits, plan.sent)

    def reduce(self, state: StrategyState, updates: Updates) -> Stats:
        """The weighted sum of what clients trained, each at the global rank.

        Args:
            updates: ordered by client name; tensors are read when they are asked for, so
                going tensor by tensor holds one tensor of one client at a time.
        """
        return Stats(self.sums(state, updates), sum(update.weight for update in updates))

    def refactor(self, state: StrategyState, stats: Stats) -> StrategyState:
        """The next state; here the mean takes the place of the factors that were trained."""
        return self.advance(state, {name: mean.float() for name, mean in stats.mean().items()})

    def global_delta(self, state: StrategyState) -> AdapterState:
        """The global adapter, relative to the original base: folds become further ranks."""
        adapter = self.adapter(state)
        if not folds(state.tensors):
            return adapter
        return expanded(adapter, state.tensors)

    # what subclasses build with

    def adapter(self, state: StrategyState) -> AdapterState:
        """Factors and heads of the state, without folds and whatever else it holds."""
        names = trained_shapes(state.spec, self.traits)
        held = {name: state.tensors[name] for name in names if name in state.tensors}
        return AdapterState(state.spec, held)

    def advance(
        self,
        state: StrategyState,
        tensors: Mapping[str, Tensor],
        extra: Mapping[str, Any] | None = None,
    ) -> StrategyState:
        """The state one round later, with `tensors` and `extra` in place of their old values."""
        return replace(
            state,
            round=state.round + 1,
            tensors={**state.tensors, **tensors},
            extra={**state.extra, **(extra or {})},
        )

    def sums(
        self, state: StrategyState, updates: Updates, names: Sequence[str] | None = None
    ) -> dict[str, Tensor]:
        """Name -> sum_i weight_i trained_i, float64, each at the global rank."""
        lifted = [self.lift(state.spec, update) for update in updates]
        sums: dict[str, Tensor] = {}
        for name in names if names is not None else (lifted[0] if lifted else ()):
            for tensors, update in zip(lifted, updates, strict=True):
                term = tensors[name] * update.weight
                sums[name] = sums[name].add_(term) if name in sums else term
        return sums

    def head_sums(self, state: StrategyState, updates: Updates) -> dict[str, Tensor]:
        """`sums` of the heads alone."""
        return self.sums(state, updates, sorted(state.spec.head_shapes))

    def stacks(self, state: StrategyState, updates: Updates) -> Stacks:
        """Layer -> the mean product sum_i p_i s B_i A_i as a stack."""
        total = sum(update.weight for update in updates)
        return Stacks(
            state.spec.layers,
            lambda layer: [self.product(update, layer.name) for update in updates],
            [update.weight / total for update in updates],
        )

    def product(self, update: ClientUpdate, layer: str) -> Pair:
        """(s B_i (d, r_i), A_i (r_i, k)), float64: what one client ended with."""
        own = update.delta.spec.layer(layer)
        if update.products is not None:
            return update.products(own)
        b, a = bilinear(self.traits)
        ended = update.ended
        return own.scale * ended[f"{layer}.{b}"], ended[f"{layer}.{a}"]

    def lift(self, spec: AdapterSpec, update: ClientUpdate) -> Mapping[str, Tensor]:
        """What the client ended with, float64, embedded at the global rank with zeros."""
        trained = update.trained
        if update.delta.spec.rank == spec.rank:
            return trained
        small = {layer.name: layer for layer in update.delta.spec.layers}
        whole = {layer.name: layer for layer in spec.layers}

        def read(name: str) -> Tensor:
            layer, factor = split_name(name)
            if layer not in whole:
                return trained[name]
            return self.traits.resize(factor, trained[name], small[layer], whole[layer])

        return LazyTensors(trained, read)

    @classmethod
    def misfit(cls, traits: MethodTraits) -> str:
        """Why the strategy cannot merge adapters of a method, and what it can; "" if it can."""
        if cls.needs == "any":
            return ""
        if traits.bilinear_factors is None:
            why = (
                "is averaged exactly as it is"
                if traits.affine
                else "is not linear in either of its factors"
            )
            return (
                f"works on two factors, but method {traits.name!r} {why}; "
                "choose strategy fedit, or method lora, rslora, pissa or vera"
            )
        if cls.needs == "product" and not traits.product:
            return (
                "needs a weight change that is s B A and nothing else, which method "
                f"{traits.name!r} is not; choose method lora or rslora, or a strategy such as "
                "ffa-lora"
            )
        return ""

    def check_method(self) -> None:
        """Refuses an adapter method the strategy cannot merge; needs no model.

        Raises:
            ConfigError: with the reason and what to choose instead.
        """
        if why := self.misfit(self.traits):
            raise ConfigError(f"strategy {self.name!r} {why}")

    @staticmethod
    def _rank_misfit(
        traits: MethodTraits, spec: AdapterSpec, ranks: Sequence[int], *, exact: bool
    ) -> str:
        """Why clients of these ranks cannot be merged, or not exactly; "" if they can.

        Raises:
            AdapterError: the method has no exact embedding between the ranks.
        """
        for rank in ranks:
            small = with_rank(spec, rank)
            for old, new in zip(spec.layers, small.layers, strict=True):
                shapes = traits.factor_shapes(new)
                for factor, shape in traits.factor_shapes(old).items():
                    traits.resize(factor, torch.zeros(shape), old, new)
                    if exact and old.rank != new.rank and shapes[factor] == shape:
                        return (
                            f"cannot average clients of ranks {rank} and {spec.rank} exactly: "
                            f"factor {factor} of method {traits.name!r} is not made of slots"
                        )
        return ""

    @classmethod
    def _merges_ranks(cls, traits: MethodTraits, spec: AdapterSpec, ranks: Sequence[int]) -> bool:
        try:
            return cls.hetero_rank and not cls._rank_misfit(traits, spec, ranks, exact=cls.exact)
        except AdapterError:
            return False

    def _or_choose(self, fits: Callable[[type["Strategy"]], bool]) -> str:
        """Names the strategies that take this method and fit, as the end of an advice."""
        # the table imports this module
        from fedlora.strategies import STRATEGIES

        names = [
            name
            for name, other in STRATEGIES.items()
            if not other.misfit(self.traits) and fits(other)
        ]
        return f", or choose strategy {' or '.join(names)}" if names else ""


def bilinear(traits: MethodTraits) -> tuple[str, str]:
    """The method's two factors, zero-initialised one first; `check` has made sure of them."""
    assert traits.bilinear_factors is not None
    return traits.bilinear_factors


def cut(adapter: AdapterState, rank: int, traits: MethodTraits) -> AdapterState:
    """The leading `rank` slots of every layer; the adapter itself when it has that rank."""
    if rank == adapter.spec.rank:
        return adapter
    spec = with_rank(adapter.spec, rank)
    tensors = dict(adapter.tensors)
    for old, new in zip(adapter.spec.layers, spec.layers, strict=True):
        for factor in traits.factor_shapes(old):
            name = f"{old.name}.{factor}"
            tensors[name] = traits.resize(factor, tensors[name], old, new)
    return AdapterState(spec, tensors)
