"""Norm cap: an update longer than tau is shortened to tau, u_i * min(1, tau / ||u_i||).

Sun et al., "Can You Really Backdoor Federated Learning?", https://arxiv.org/abs/1911.07963,
section 4. With tau the median of the round's norms nobody has to know the scale of an
honest update.

In factor space the change of every sent tensor is scaled. In product space it is the weight
change: gamma B_i A_i + (1 - gamma) B_g A_g, kept as the stack [gamma s B_i | (1 - gamma) s B_g]
times [A_i; A_g] of rank 2 r, which only a strategy that merges products can take.
"""

import statistics
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from torch import Tensor

from fedlora.adapter import LayerSpec, split_name
from fedlora.errors import ConfigError, StrategyError
from fedlora.linalg import stack
from fedlora.messages import ClientUpdate, LazyTensors, Pair
from fedlora.strategies.base import Conditions, Strategy, StrategyState, Updates
from fedlora.strategies.wrappers.base import Wrapper
from fedlora.strategies.wrappers.distances import (
    checked_space,
    start_product,
    update_norm,
    with_delta,
)


class NormCap(Wrapper):
    """Updates of at most a given length.

    The norm is over all that a client sends, control variates included, and all of it is
    scaled. A cap taken from the round itself makes one client's share depend on the others,
    so that it keeps no guarantee for clients.

    Options:
        cap: tau; 0 takes the median of the round's norms.
        space: "factor" or "product".
    """

    name = "norm-cap"
    exact = False
    options: ClassVar[Mapping[str, Any]] = {"cap": 0.0, "space": "factor"}

    def __init__(self, inner: Strategy, options: Mapping[str, Any] | None = None) -> None:
        super().__init__(inner, options)
        self.space = checked_space(self.name, self.settings["space"])
        if self.settings["cap"] < 0:
            raise ConfigError(
                f"federation.wrappers.norm-cap.cap = {self.settings['cap']:g}; expected a norm "
                "above 0, or 0 for the median of the round"
            )
        if not self.settings["cap"]:
            self.linear = False
            self.privacy = self.privacy & {"record"}
        counted = "the median of the norms counts clients, not their weights"
        fixed = "an update longer than the cap is never taken whole"
        self.waives = {
            **self.waives,
            "heads": "heads are scaled with the update they came with",
            **(
                dict.fromkeys(("alone", "same"), fixed)
                if self.settings["cap"]
                else dict.fromkeys(("split", "zero-weight"), counted)
            ),
        }

    def check(self, given: Conditions) -> None:
        super().check(given)
        if self.space == "factor":
            return
        *wrappers, core = self.inside()
        if core.needs != "product":
            raise ConfigError(
                'federation.wrappers.norm-cap.space = "product" caps the weight change, but '
                f'strategy {core.name!r} merges factors; choose space = "factor", or a strategy '
                "that merges products, such as flexlora"
            )
        for wrapper in wrappers:
            if wrapper.settings.get("space", "product") == "factor" or not wrapper.hetero_rank:
                raise ConfigError(
                    'federation.wrappers.norm-cap.space = "product" leaves no factors for '
                    f"wrapper {wrapper.name!r} inside it, which reads them; put it before "
                    'norm-cap, or choose space = "factor" for norm-cap'
                )

    def screen(self, state: StrategyState, updates: Updates) -> tuple[Updates, dict[str, Any]]:
        norms = [update_norm(self.traits, update, self.space) for update in updates]
        cap = float(self.settings["cap"]) or statistics.median(norms)
        shares = [min(1.0, cap / norm) if norm else 1.0 for norm in norms]
        passed = [self._scaled(u, share) for u, share in zip(updates, shares, strict=True)]
        capped = [u.client for u, share in zip(updates, shares, strict=True) if share < 1.0]
        return passed, {"cap": cap, "capped": capped}

    def _scaled(self, update: ClientUpdate, share: float) -> ClientUpdate:
        """`update` times `share`; of a whole update nothing changes, not even a bit."""
        if share == 1.0:
            return update
        delta, control = update.delta.tensors, update.control
        capped = replace(
            with_delta(update, lambda name: share * delta[name].double()),
            control=LazyTensors(control, lambda name: share * control[name].double()),
        )
        if self.space == "factor":
            return capped
        layers = {layer.name for layer in update.delta.spec.layers}

        def read(name: str) -> Tensor:
            if split_name(name)[0] in layers:
                raise StrategyError(
                    f'wrapper "norm-cap" with space = "product" capped the weight change of '
                    f'{name}, which has no factors of its own; choose space = "factor", or a '
                    "strategy that merges products alone, such as flexlora"
                )
            return share * delta[name].double()

        def products(layer: LayerSpec) -> Pair:
            ended = self.product(update, layer.name)
            start = start_product(self.traits, update, layer.name)
            return stack([ended, start], [share, 1.0 - share])

        return replace(with_delta(capped, read), products=products)
