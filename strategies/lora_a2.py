"""LoRA-A2: factors in turn, and every client trains only the rank slots that matter to it.

Koo et al., "Towards Robust and Efficient Federated Low-Rank Adaptation with Heterogeneous
Clients", https://arxiv.org/abs/2410.22815, section 4: alternating freeze, and adaptive rank
selection. A trial before each round scores every slot of every layer; the client keeps the
best r_i * (number of layers) of all of them, trains these alone and sends these alone.

With p_i the weight of client i in the round, a slot moves by the sum of p_i times what the
clients that trained it changed: the exact mean of the clients' changes, to which those that
left the slot alone contribute zero.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from fedlora.errors import ConfigError
from fedlora.messages import RoundPlan
from fedlora.strategies.base import ClientInfo, Conditions, PrivacyUnit, StrategyState
from fedlora.strategies.rolora import RoLora


class LoraA2(RoLora):
    """RoLoRA on a budget of slots; with a budget of all slots it is RoLoRA.

    Options: `rate_ratio`, the learning rate of B over that of A; `trial_steps`, optimiser
    steps of the trial, 0 for one pass over the client's data.
    """

    name = "lora-a2"
    needs = "product"
    budgets = True
    # which slots a client chose is not covered by noise on what it sends
    privacy: frozenset[PrivacyUnit] = frozenset()
    options: ClassVar[Mapping[str, Any]] = {"rate_ratio": 5.0, "trial_steps": 0}

    def check(self, given: Conditions) -> None:
        """Also that the options can be used.

        Raises:
            ConfigError: see `Strategy.check`.
        """
        super().check(given)
        place = "federation.strategy_options"
        ratio, steps = self.settings["rate_ratio"], self.settings["trial_steps"]
        if not 0 < ratio < 1e6:
            raise ConfigError(f"{place}.rate_ratio = {ratio:g}; expected 0 < rate_ratio < 1e6")
        if steps < 0:
            raise ConfigError(f"{place}.trial_steps = {steps}; expected at least 0")

    def rank(self, state: StrategyState, client: ClientInfo) -> int:
        """Everybody holds the whole adapter; a client's own rank is its budget."""
        return state.spec.rank

    def plan(self, state: StrategyState, client: ClientInfo, plan: RoundPlan) -> RoundPlan:
        plan = super().plan(state, client, plan)
        layers = state.spec.layers
        budget = client.rank * len(layers)
        everything = budget >= sum(layer.rank for layer in layers)
        return replace(
            plan,
            slots=0 if everything else budget,
            trial_steps=0 if everything else self.settings["trial_steps"],
            rates={"B": float(self.settings["rate_ratio"])},
        )
