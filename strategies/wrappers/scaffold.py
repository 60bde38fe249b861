"""SCAFFOLD: control variates take out of each client's steps what is peculiar to its data.

Karimireddy et al., "SCAFFOLD: Stochastic Controlled Averaging for Federated Learning",
https://arxiv.org/abs/1910.06378, algorithm 1 with option II. The server keeps c, every client
its own c_i; clients step along g - c_i + c and send the change of theirs besides their own:

    c_i+ = c_i - c + (theta_g - theta_i) / (sum of learning rates)
    c   <- c + |S| / N * mean over S of (c_i+ - c_i)

The mean is not weighted, and N is the number of all clients, of whom S took part. c is that
of the sent tensors; where factors are trained in turn, each has its own, which moves in the
rounds that train it.

A difference of two means of gradients is no gradient once factors are made anew or steps are
not those of plain SGD, so that both are refused.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from fedlora.adapter import trained_shapes
from fedlora.errors import ConfigError, StrategyError
from fedlora.messages import CONTROL, RoundPlan, Start
from fedlora.strategies.base import (
    ClientInfo,
    Conditions,
    Stats,
    Strategy,
    StrategyState,
    Updates,
)
from fedlora.strategies.wrappers.base import Wrapper
from fedlora.strategies.wrappers.gauge import refuse_new_gauge


class Scaffold(Wrapper):
    """Adds control variates to plans, broadcasts and updates.

    A wrapper that screens updates belongs outside, or what it screens out would still reach
    c. Gradient clipping (`training.max_grad_norm`) acts on the corrected gradient; while it
    does, a control variate is a mean of clipped gradients.

    Options:
        rate: eta_g, the server's step along the strategy's change.
        clients: N; 0 takes the number of clients that `check` was told of, which is that of
            the federation.
    """

    name = "scaffold"
    hetero_rank = False
    asynchronous = False
    # the change of the control variates would need a share of the clip of its own
    privacy = frozenset({"record"})
    waives: Mapping[str, str] = {
        "split": "control variates count clients, not their weights",
        "zero-weight": "control variates count clients, not their weights",
    }
    options: ClassVar[Mapping[str, Any]] = {"rate": 1.0, "clients": 0}

    def __init__(self, inner: Strategy, options: Mapping[str, Any] | None = None) -> None:
        super().__init__(inner, options)
        self.clients = int(self.settings["clients"])
        if self.settings["rate"] <= 0 or self.clients < 0:
            raise ConfigError(
                f"federation.wrappers.scaffold has rate = {self.settings['rate']:g} and clients = "
                f"{self.clients}; expected a rate above 0, and a number of clients or 0"
            )
        self.exact = inner.exact and self.settings["rate"] == 1.0

    def check(self, given: Conditions) -> None:
        super().check(given)
        if given.optimizer != "sgd" or given.momentum:
            raise ConfigError(
                "wrapper 'scaffold' needs plain SGD, for its control variates are means of "
                f'gradients, but training.optimizer = "{given.optimizer}" with momentum '
                f'{given.momentum:g}; set training.optimizer = "sgd" and training.momentum = 0'
            )
        refuse_new_gauge(self, "the control variates")
        if given.compression.up.top_k < 1:
            raise ConfigError(
                "wrapper 'scaffold' needs whole control variates, for their entries correct every "
                f"step, but with compression.top_k = {given.compression.up.top_k:g} only some "
                'travel; set compression.top_k = 1 and choose compression.up = "int8", say'
            )
        *_, core = self.inside()
        if core.budgets:
            raise ConfigError(
                "wrapper 'scaffold' needs every client to train the same slots, but with strategy "
                f"{core.name!r} clients choose theirs; choose fedit, ffa-lora or rolora"
            )
        for strategy in self.inside():
            screens = isinstance(strategy, Wrapper) and (
                type(strategy).screen is not Wrapper.screen
            )
            if screens or isinstance(strategy, Scaffold):
                raise ConfigError(
                    f"wrapper {strategy.name!r} stands inside scaffold, where control variates of "
                    "updates that it changes would still count; list scaffold after it in "
                    "federation.wrappers, and once"
                )
        n = len(given.ranks)
        if self.settings["clients"] and self.settings["clients"] < n:
            raise ConfigError(
                f"federation.wrappers.scaffold.clients = {self.settings['clients']}, but the "
                f"federation has {n} clients; expected all of them, or 0"
            )
        # fixed before round 1 by the job alone, so that a resumed run finds the same
        self.clients = int(self.settings["clients"]) or n

    def plan(self, state: StrategyState, client: ClientInfo, plan: RoundPlan) -> RoundPlan:
        made = self.inner.plan(state, client, plan)
        if made.slots:
            raise StrategyError(
                "wrapper 'scaffold' needs every client to train the same slots, but the strategy "
                f"lets client {client.name!r} choose {made.slots}; choose fedit, ffa-lora or rolora"
            )
        return replace(made, control=True)

    def broadcast(self, state: StrategyState, client: ClientInfo) -> Start:
        start = self.inner.broadcast(state, client)
        names = trained_shapes(state.spec, self.traits, self.factors(state))
        return replace(start, control={name: _control(state, name) for name in names})

    def expect(self, state: StrategyState, plan: RoundPlan) -> dict[str, tuple[int, ...]]:
        shapes = self.inner.expect(state, plan)
        return {**shapes, **{CONTROL + name: shape for name, shape in shapes.items()}}

    def reduce(self, state: StrategyState, updates: Updates) -> Stats:
        stats = self.inner.reduce(state, updates)
        sums: dict[str, Tensor] = {}
        for name in updates[0].control if updates else ():
            for update in updates:
                term = update.control[name].double()
                key = CONTROL + name
                sums[key] = sums[key] + term if key in sums else term
        return replace(stats, sums={**stats.sums, **sums})

    def refactor(self, state: StrategyState, stats: Stats) -> StrategyState:
        if not self.clients:
            raise StrategyError(
                "wrapper 'scaffold' does not know the number of clients; call check first, or set "
                "federation.wrappers.scaffold.clients"
            )
        control = {k: v for k, v in stats.sums.items() if k.startswith(CONTROL)}
        own = {k: v for k, v in stats.sums.items() if k not in control}
        merged = self.inner.refactor(state, replace(stats, sums=own))
        tensors = dict(merged.tensors)
        rate = float(self.settings["rate"])
        for key, total in control.items():
            name = key.removeprefix(CONTROL)
            # |S| / N times the mean over S
            tensors[key] = (_control(state, name).double() + total / self.clients).float()
            if rate != 1.0:
                old = state.tensors[name].double()
                tensors[name] = (old + rate * (merged.tensors[name].double() - old)).float()
        return replace(merged, tensors=tensors)


def _control(state: StrategyState, name: str) -> Tensor:
    """C of one tensor; zero until a round has trained it."""
    return state.tensors.get(CONTROL + name, torch.zeros_like(state.tensors[name]))
