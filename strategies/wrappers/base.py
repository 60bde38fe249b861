"""Wrapper: a strategy around a strategy.

It changes the updates on their way in (`screen`), or the next state on its way out (by its
own `refactor`), or what clients are asked to do (by its own `plan`), and leaves the rest to
the strategy inside.
"""

from collections.abc import Hashable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from fedlora.adapter import AdapterState
from fedlora.errors import ConfigError
from fedlora.messages import RoundPlan, Start
from fedlora.strategies.base import (
    ClientInfo,
    Conditions,
    Stats,
    Strategy,
    StrategyState,
    Updates,
    checked_options,
)


class Wrapper(Strategy):
    """A strategy that passes everything on to `inner`.

    Its `exact`, `linear`, `hetero_rank`, `asynchronous` and `privacy` say what it leaves of
    the same property of the strategy inside.

    Args:
        inner: the strategy (or wrapper) inside.
        options: from the wrapper's table in `federation.wrappers`.

    Raises:
        ConfigError: an unknown option, or a value of another type than the default.
    """

    exact = True
    linear = True
    hetero_rank = True
    asynchronous = True
    privacy = frozenset({"record", "client"})

    def __init__(self, inner: Strategy, options: Mapping[str, Any] | None = None) -> None:
        self.inner = inner
        self.traits = inner.traits
        self.settings = checked_options(
            f"federation.wrappers.{self.name}",
            f"wrapper {self.name!r}",
            options or {},
            self.options,
        )
        self.exact = self.exact and inner.exact
        self.linear = self.linear and inner.linear
        self.hetero_rank = self.hetero_rank and inner.hetero_rank
        self.asynchronous = self.asynchronous and inner.asynchronous
        self.privacy = self.privacy & inner.privacy
        self.needs = inner.needs
        self.regauges = inner.regauges
        self.folds = inner.folds
        self.personal = inner.personal
        self.waives = {**inner.waives, **self.waives}
        self.budgets = inner.budgets

    def check_method(self) -> None:
        self.inner.check_method()

    def check(self, given: Conditions) -> None:
        """Refuses what the strategy inside refuses, and what the wrapper itself cannot take."""
        self.inner.check(given)
        # the strategy inside has passed, so what is wrong now is the wrapper's doing
        ranks = sorted({given.spec.rank, *given.ranks})
        if len(ranks) > 1 and not self.hetero_rank:
            raise ConfigError(
                f"wrapper {self.name!r} needs equal ranks, but clients have ranks {ranks}; give "
                f"all clients rank {given.spec.rank}, or choose krum, multi-krum, lodd or "
                'geometric-median with space = "product", or norm-cap'
            )
        if given.privacy is not None and given.privacy not in self.privacy:
            allowed = ", ".join(sorted(self.privacy)) or "none"
            raise ConfigError(
                f'privacy.unit = "{given.privacy}" is voided by wrapper {self.name!r} (it keeps '
                f"the guarantee of: {allowed}); leave it out of federation.wrappers"
            )
        if given.asynchronous and not self.asynchronous:
            raise ConfigError(
                f'federation.mode = "async" does not fit wrapper {self.name!r}, which needs '
                "updates of one version; leave it out of federation.wrappers"
            )

    def inside(self) -> Iterator[Strategy]:
        """What stands inside, outermost first; the strategy itself comes last."""
        strategy = self.inner
        yield strategy
        while isinstance(strategy, Wrapper):
            strategy = strategy.inner
            yield strategy

    def screen(self, state: StrategyState, updates: Updates) -> tuple[Updates, dict[str, Any]]:
        """The updates that the strategy inside shall see, and notes for the record."""
        return updates, {}

    def init(self, adapter: AdapterState) -> StrategyState:
        return self.inner.init(adapter)

    def factors(self, state: StrategyState) -> tuple[str, ...]:
        return self.inner.factors(state)

    def rank(self, state: StrategyState, client: ClientInfo) -> int:
        return self.inner.rank(state, client)

    def plan(self, state: StrategyState, client: ClientInfo, plan: RoundPlan) -> RoundPlan:
        return self.inner.plan(state, client, plan)

    def broadcast_key(self, state: StrategyState, client: ClientInfo) -> Hashable:
        return self.inner.broadcast_key(state, client)

    def broadcast(self, state: StrategyState, client: ClientInfo) -> Start:
        return self.inner.broadcast(state, client)

    def expect(self, state: StrategyState, plan: RoundPlan) -> dict[str, tuple[int, ...]]:
        return self.inner.expect(state, plan)

    def reduce(self, state: StrategyState, updates: Updates) -> Stats:
        passed, notes = self.screen(state, updates)
        stats = self.inner.reduce(state, passed)
        if not notes:
            return stats
        return replace(stats, notes={**stats.notes, self.name: notes})

    def refactor(self, state: StrategyState, stats: Stats) -> StrategyState:
        return self.inner.refactor(state, stats)

    def global_delta(self, state: StrategyState) -> AdapterState:
        return self.inner.global_delta(state)
