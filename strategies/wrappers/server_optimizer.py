"""FedAdam, FedYogi, FedAdagrad and server momentum: the server takes its own kind of step.

Reddi et al., "Adaptive Federated Optimization", https://arxiv.org/abs/2003.00295,
algorithm 2, with the pseudo-gradient D = (what the strategy inside merged) - (old tensor):

    m <- beta1 m + (1 - beta1) D
    v <- v + D^2                                  (Adagrad)
    v <- v - (1 - beta2) D^2 sign(v - D^2)        (Yogi)
    v <- beta2 v + (1 - beta2) D^2                (Adam)
    x <- x + eta m / (sqrt(v) + tau)

v starts at tau^2, the smallest value that the algorithm allows. Momentum is that of Hsu et
al., "Measuring the Effects of Non-Identical Data Distribution for Federated Visual
Classification", https://arxiv.org/abs/1909.06335, section 4.3: m <- beta m + D, x <- x + eta m.

Moments are kept by tensor and mean something only while the factors keep their gauge. Where
factors are trained in turn, only those of the round move, and so do their moments.
"""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from fedlora.adapter import trained_shapes
from fedlora.errors import ConfigError
from fedlora.strategies.base import Conditions, Stats, Strategy, StrategyState
from fedlora.strategies.wrappers.base import Wrapper
from fedlora.strategies.wrappers.gauge import refuse_new_gauge


class ServerOptimizer(Wrapper):
    """A step of the server's own along what the strategy inside would have changed.

    Attributes:
        decay: the option that is the decay of m.
    """

    exact = False
    decay: ClassVar[str] = "beta1"
    waives: Mapping[str, str] = {
        "alone": "the server's step is not the clients' mean change",
        "heads": "heads take the server's step, as every tensor",
        "same": "the server's step is not the clients' mean change",
    }

    def __init__(self, inner: Strategy, options: Mapping[str, Any] | None = None) -> None:
        super().__init__(inner, options)
        for key, value in self.settings.items():
            fits = {"eta": value > 0, "tau": value > 0, "beta2": 0 <= value <= 1}
            if not fits.get(key, 0 <= value < 1 or isinstance(value, bool)):
                bounds = {"eta": "above 0", "tau": "above 0", "beta2": "from 0 to 1"}
                raise ConfigError(
                    f"federation.wrappers.{self.name}.{key} = {value:g}; expected a number "
                    f"{bounds.get(key, 'from 0 to below 1')}"
                )
        if self.settings[self.decay]:
            still = "momentum goes on when clients stand still"
            self.waives = {**self.waives, "still": still}

    def check(self, given: Conditions) -> None:
        super().check(given)
        refuse_new_gauge(self, "the server's moments")

    def refactor(self, state: StrategyState, stats: Stats) -> StrategyState:
        merged = self.inner.refactor(state, stats)
        tensors = dict(merged.tensors)
        prefix = f"opt.{self.name}"
        counts: dict[str, int] = dict(merged.extra.get(prefix, {}))
        for name in trained_shapes(state.spec, self.traits, self.factors(state)):
            old = state.tensors[name].double()
            moments = {
                kind: state.tensors[key].double()
                for kind in ("m", "v")
                if (key := f"{prefix}.{kind}.{name}") in state.tensors
            }
            counts[name] = counts.get(name, 0) + 1
            step, moments = self.step(merged.tensors[name].double() - old, moments, counts[name])
            tensors[name] = (old + step).float()
            for kind, moment in moments.items():
                tensors[f"{prefix}.{kind}.{name}"] = moment.float()
        return replace(merged, tensors=tensors, extra={**merged.extra, prefix: counts})

    @abstractmethod
    def step(
        self, change: Tensor, moments: Mapping[str, Tensor], count: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """How far one tensor moves, and its moments after that; all float64.

        Args:
            change: D.
            moments: "m" and "v" of the tensor's last step; empty before its first.
            count: 1-based number of the step.
        """


class Adaptive(ServerOptimizer):
    """Steps along m, coordinate by coordinate relative to sqrt(v).

    Options:
        eta: server learning rate. A step moves a coordinate by about eta, whatever the size
            of its change, so that for factors eta must be small.
        beta1, beta2: decay of m and v.
        tau: degree of adaptivity; for changes far below tau the step is a scaled mean.
    """

    options: ClassVar[Mapping[str, Any]] = {"eta": 1e-2, "beta1": 0.9, "beta2": 0.99, "tau": 1e-3}

    @abstractmethod
    def second(self, v: Tensor, square: Tensor) -> Tensor:
        """The next v from the last one and D^2."""

    def step(
        self, change: Tensor, moments: Mapping[str, Tensor], count: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        beta1, tau = self.settings["beta1"], self.settings["tau"]
        m = moments.get("m", torch.zeros_like(change))
        m = beta1 * m + (1 - beta1) * change
        v = self.second(moments.get("v", self.first(change)), change**2)
        scaled_m, scaled_v = self.corrected(m, v, count)
        return self.settings["eta"] * scaled_m / (scaled_v.sqrt() + tau), {"m": m, "v": v}

    def first(self, change: Tensor) -> Tensor:
        """V before the first step."""
        return torch.full_like(change, self.settings["tau"] ** 2)

    def corrected(self, m: Tensor, v: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """M and v as the step uses them."""
        return m, v


class FedAdam(Adaptive):
    """Adam at the server.

    Options:
        eta, beta1, beta2, tau: as for all adaptive steps.
        bias_correction: divides m by 1 - beta1^t and v by 1 - beta2^t, and starts v at zero,
            as Kingma & Ba do (https://arxiv.org/abs/1412.6980, algorithm 1); algorithm 2 of
            Reddi et al. does not.
    """

    name = "fedadam"
    options: ClassVar[Mapping[str, Any]] = {**Adaptive.options, "bias_correction": False}

    def first(self, change: Tensor) -> Tensor:
        if self.settings["bias_correction"]:
            return torch.zeros_like(change)
        return super().first(change)

    def second(self, v: Tensor, square: Tensor) -> Tensor:
        beta2 = float(self.settings["beta2"])
        return beta2 * v + (1 - beta2) * square

    def corrected(self, m: Tensor, v: Tensor, count: int) -> tuple[Tensor, Tensor]:
        if not self.settings["bias_correction"]:
            return m, v
        beta1, beta2 = self.settings["beta1"], self.settings["beta2"]
        return m / (1 - beta1**count), v / (1 - beta2**count)


class FedYogi(Adaptive):
    """Yogi at the server: v follows D^2 by steps whose size does not depend on v.

    Options:
        eta, beta1, beta2, tau: as for all adaptive steps.
    """

    name = "fedyogi"

    def second(self, v: Tensor, square: Tensor) -> Tensor:
        rate = 1.0 - float(self.settings["beta2"])
        return v - rate * square * (v - square).sign()


class FedAdagrad(Adaptive):
    """Adagrad at the server, by default without momentum, as in the paper's section 5.

    Options:
        eta, beta1, tau: as for all adaptive steps.
    """

    name = "fedadagrad"
    options: ClassVar[Mapping[str, Any]] = {"eta": 1e-2, "beta1": 0.0, "tau": 1e-3}

    def second(self, v: Tensor, square: Tensor) -> Tensor:
        return v + square


class FedMomentum(ServerOptimizer):
    """Momentum at the server (FedAvgM).

    Options:
        eta: server learning rate.
        beta: decay; a steady change is taken 1 / (1 - beta) fold in the end.
    """

    name = "fedmomentum"
    decay = "beta"
    options: ClassVar[Mapping[str, Any]] = {"eta": 1.0, "beta": 0.9}

    def step(
        self, change: Tensor, moments: Mapping[str, Tensor], count: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        m = self.settings["beta"] * moments.get("m", torch.zeros_like(change)) + change
        return self.settings["eta"] * m, {"m": m}
