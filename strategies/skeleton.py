"""My strategy: the mean of all clients, which goes on a little in the direction it came from.

`fedlora strategy new` copies this file. It runs as it is; change it step by step, and after
each step run `fedlora strategy check` on it.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from fedlora.adapter import MethodTraits
from fedlora.errors import ConfigError
from fedlora.strategies.base import Stats, Strategy, StrategyState


class MyStrategy(Strategy):
    """Weighted mean of every factor, with momentum on the server.

    Options:
        momentum: part of the last step that is taken again, 0 <= momentum < 1.
    """

    # What the strategy can do. The checks before round 1 and `strategy check` go by it.
    name = "my-strategy"
    exact = False  # the merged B A is not the mean of the clients' B_i A_i
    linear = True  # reduce is one weighted sum
    hetero_rank = False  # all clients must hold the same rank
    privacy = frozenset({"record", "client"})
    options: ClassVar[Mapping[str, Any]] = {"momentum": 0.3}
    # Laws that momentum breaks by design, with the reason.
    waives: Mapping[str, str] = {
        "same": "momentum goes beyond what the clients agree on",
        "alone": "momentum goes beyond what the one client sent",
        "still": "momentum moves on when the clients rest",
    }

    def __init__(self, traits: MethodTraits, options: Mapping[str, Any] | None = None) -> None:
        super().__init__(traits, options)  # fills self.settings: nothing else belongs on self
        if not 0 <= self.settings["momentum"] < 1:
            raise ConfigError(
                f"federation.strategy_options.momentum = {self.settings['momentum']:g}; "
                "expected 0 <= momentum < 1"
            )

    def factors(self, state: StrategyState) -> tuple[str, ...]:
        """Names of the factors that clients train: here all that the adapter method has."""
        return tuple(sorted(self.traits.factor_shapes(state.spec.layers[0])))

    # reduce(state, updates) is inherited: the weighted sum of what clients ended with, float64.

    def refactor(self, state: StrategyState, stats: Stats) -> StrategyState:
        """The next state: new tensors, made of the old ones and of the sums."""
        momentum = self.settings["momentum"]
        tensors = {}
        for name, mean in stats.mean().items():
            if name in state.spec.head_shapes:
                tensors[name] = mean.float()
                continue
            old = state.tensors[name].double()
            step = mean - old
            # what the next round must remember goes into the state, never onto self
            if (last := state.tensors.get(f"step.{name}")) is not None:
                step = step + momentum * last.double()
            tensors[name] = (old + step).float()
            tensors[f"step.{name}"] = step.float()
        return self.advance(state, tensors)
