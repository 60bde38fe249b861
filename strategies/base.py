"""Strategy: how clients' adapters become the next global adapter.

A strategy is a set of pure functions over an explicit state that can be written to disk:

    init -> (plan, broadcast, expect) per client -> reduce -> refactor -> ...

`reduce` is the linear part: it sees one update at a time, ordered by client name, and adds
in float64. `refactor` turns the sums into the next state. Neither changes its inputs.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

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
from fedlora.errors import ConfigError, near_miss
from fedlora.messages import ClientUpdate

Updates = Callable[[], Iterable[ClientUpdate]]


@dataclass(frozen=True)
class ClientInfo:
    """What a strategy knows of a client: its name and the rank it can hold."""

    name: str
    rank: int


@dataclass(frozen=True)
class StrategyState:
    """Everything a strategy carries from round to round; a checkpoint is all of it.

    Attributes:
        spec: the global adapter's spec.
        round: rounds completed.
        tensors: global factors and heads (and whatever else the strategy keeps), float32.
        extra: small JSON values.
    """

    spec: AdapterSpec
    round: int
    tensors: Mapping[str, Tensor]
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Stats:
    """What `reduce` leaves of the updates.

    Attributes:
        sums: weighted sums, float64.
        weight: sum of the weights.
        num_updates: how many updates went in.
    """

    sums: Mapping[str, Tensor]
    weight: float
    num_updates: int

    def mean(self) -> dict[str, Tensor]:
        """Sums / weight, float64."""
        return {name: total / self.weight for name, total in self.sums.items()}


class Strategy(ABC):
    """One way to merge clients' adapters.

    Attributes:
        name: as in `federation.strategy`.
        exact: the merged weight change equals the weighted mean of the clients' changes.
        linear: the merge is one weighted sum, so that secure sums and central noise apply.
        hetero_rank: clients may hold different ranks.
        options: option name -> default.

    Args:
        traits: the adapter method.
        options: from `federation.strategy_options`.

    Raises:
        ConfigError: an unknown option, or a value of another type than the default.
    """

    name: ClassVar[str]
    exact: ClassVar[bool]
    linear: ClassVar[bool]
    hetero_rank: ClassVar[bool]
    options: ClassVar[Mapping[str, Any]] = {}

    def __init__(self, traits: MethodTraits, options: Mapping[str, Any] | None = None) -> None:
        self.traits = traits
        given = dict(options or {})
        for key in given:
            if key not in self.options:
                known = ", ".join(self.options) or "none"
                raise ConfigError(
                    f"federation.strategy_options.{key} is not known to strategy {self.name!r}"
                    f"{near_miss(key, self.options)}; known: {known}"
                )
            value, default = given[key], self.options[key]
            whole = isinstance(default, float) and type(value) is int
            if default is not None and type(value) is not type(default) and not whole:
                raise ConfigError(
                    f"federation.strategy_options.{key} = {value!r} is a {type(value).__name__}; "
                    f"expected a {type(default).__name__}"
                )
        self.settings = {**self.options, **given}

    def check(self, spec: AdapterSpec, ranks: Iterable[int]) -> None:
        """Refuses, before round 1, an adapter or ranks that the strategy cannot merge.

        Raises:
            ConfigError: with the reason and what to choose instead.
        """
        odd = sorted({rank for rank in ranks if rank != spec.rank})
        if odd and not self.hetero_rank:
            raise ConfigError(
                f"strategy {self.name!r} needs equal ranks, but clients have ranks "
                f"{sorted({*odd, spec.rank})}; give all clients rank {spec.rank}, or choose a "
                "strategy that takes unequal ranks (ffa-lora, rolora)"
            )
        # an exact embedding between ranks is the method's business; ask before round 1
        for rank in odd:
            small = with_rank(spec, rank)
            for old, new in zip(spec.layers, small.layers, strict=True):
                shapes = self.traits.factor_shapes(new)
                for factor, shape in self.traits.factor_shapes(old).items():
                    self.traits.resize(factor, torch.zeros(shape), old, new)
                    if self.exact and old.rank != new.rank and shapes[factor] == shape:
                        raise ConfigError(
                            f"strategy {self.name!r} cannot average clients of ranks {rank} and "
                            f"{spec.rank} exactly: factor {factor} of method "
                            f"{self.traits.name!r} is not made of slots; give all clients rank "
                            f"{spec.rank}, or choose method lora"
                        )

    def init(self, adapter: AdapterState) -> StrategyState:
        """The state before round 1."""
        return StrategyState(adapter.spec, 0, dict(adapter.tensors))

    @abstractmethod
    def factors(self, state: StrategyState) -> tuple[str, ...]:
        """Names of the factors that clients train and send in the next round."""

    def broadcast_key(self, state: StrategyState, client: ClientInfo) -> Hashable:
        """Clients with equal keys receive the same `broadcast`, which is made once."""
        return client.rank

    def broadcast(self, state: StrategyState, client: ClientInfo) -> AdapterState:
        """The adapter that a client with this key starts the next round from."""
        return cut(self.global_delta(state), client.rank, self.traits)

    def expect(self, state: StrategyState, client: ClientInfo) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor that must come back."""
        spec = state.spec
        if client.rank != spec.rank:
            spec = with_rank(spec, client.rank)
        return trained_shapes(spec, self.traits, self.factors(state))

    def reduce(self, state: StrategyState, updates: Updates) -> Stats:
        """The weighted sum of what clients trained, each at the global rank.

        Args:
            updates: yields the updates in order of client name; may be called twice.
        """
        sums: dict[str, Tensor] = {}
        weight, count = 0.0, 0
        for update in updates():
            for name, trained in self.lift(state.spec, update).items():
                term = trained * update.weight
                sums[name] = sums[name].add_(term) if name in sums else term
            weight += update.weight
            count += 1
        return Stats(sums, weight, count)

    def refactor(self, state: StrategyState, stats: Stats) -> StrategyState:
        """The next state; here the mean takes the place of the factors that were trained."""
        mean = {name: value.float() for name, value in stats.mean().items()}
        return replace(state, round=state.round + 1, tensors={**state.tensors, **mean})

    def global_delta(self, state: StrategyState) -> AdapterState:
        """The global adapter, relative to the original base."""
        return AdapterState(state.spec, state.tensors)

    def lift(self, spec: AdapterSpec, update: ClientUpdate) -> dict[str, Tensor]:
        """What the client ended with, float64, embedded at the global rank with zeros."""
        trained = update.trained
        if update.delta.spec.rank == spec.rank:
            return trained
        small = {layer.name: layer for layer in update.delta.spec.layers}
        whole = {layer.name: layer for layer in spec.layers}
        lifted = {}
        for name, tensor in trained.items():
            layer, factor = split_name(name)
            if layer in whole:
                tensor = self.traits.resize(factor, tensor, small[layer], whole[layer])
            lifted[name] = tensor
        return lifted


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


def needs_bilinear(strategy: str, traits: MethodTraits) -> tuple[str, str]:
    """The method's two factors (zero-initialised one first).

    Raises:
        ConfigError: the method has no such pair.
    """
    if traits.bilinear_factors is None:
        why = (
            "is averaged exactly as it is"
            if traits.affine
            else "is not linear in either of its factors"
        )
        raise ConfigError(
            f"strategy {strategy!r} freezes one of two factors, but method {traits.name!r} {why}; "
            "choose strategy fedit, or method lora, rslora, pissa or vera"
        )
    return traits.bilinear_factors
