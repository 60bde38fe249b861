"""FedProx: clients are held near what they started the round from.

Li et al., "Federated Optimization in Heterogeneous Networks",
https://arxiv.org/abs/1812.06127, section 3.2: each client minimises its own loss plus
mu/2 ||theta - theta_g||^2; the server's part is that of the strategy inside.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from fedlora.errors import ConfigError
from fedlora.messages import RoundPlan
from fedlora.strategies.base import ClientInfo, Conditions, Strategy, StrategyState
from fedlora.strategies.wrappers.distances import Spaced


class FedProx(Spaced):
    """Adds the penalty to every client's plan.

    Options:
        mu: its weight; the paper tries 0.001 to 1.
        space: "factor" takes the norm over all trained tensors, "product" over the weight
            changes s B A - s B_g A_g (and the heads), however they divide between factors.
    """

    name = "fedprox"
    options: ClassVar[Mapping[str, Any]] = {"mu": 0.01, "space": "factor"}

    def __init__(self, inner: Strategy, options: Mapping[str, Any] | None = None) -> None:
        super().__init__(inner, options)
        # nothing is compared between clients, so that ranks may differ in either space
        self.hetero_rank = inner.hetero_rank
        if self.settings["mu"] <= 0:
            raise ConfigError(
                f"federation.wrappers.fedprox.mu = {self.settings['mu']:g}; expected a weight "
                "above 0, or leave fedprox out of federation.wrappers"
            )

    def check(self, given: Conditions) -> None:
        super().check(given)
        # clients know their own factors, so that the product is no secret to the penalty
        if not (self.personal and self.traits.product):
            self.check_space()

    def plan(self, state: StrategyState, client: ClientInfo, plan: RoundPlan) -> RoundPlan:
        made = self.inner.plan(state, client, plan)
        product = self.space == "product"
        return replace(made, proximal=float(self.settings["mu"]), proximal_product=product)
