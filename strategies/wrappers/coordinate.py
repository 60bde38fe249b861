"""Coordinate-wise median and trimmed mean of the sent tensors.

Yin et al., "Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates",
https://arxiv.org/abs/1803.01498, definitions 1 and 2: element by element, over clients that
count alike.

Element by element means in factor space: all clients must start from the same factors and
stay near them, for the median of B_i A is not (median of B_i) A once A moves as well.
"""

import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from fedlora.errors import ConfigError, StrategyError
from fedlora.strategies.base import Conditions, Strategy, StrategyState, Updates
from fedlora.strategies.wrappers.base import Wrapper
from fedlora.strategies.wrappers.distances import with_delta
from fedlora.strategies.wrappers.scaffold import Scaffold


class Coordinate(Wrapper):
    """The strategy inside sees one update, made element by element of all of them.

    Its weight is the sum of theirs. Tensors are made when they are read, from all clients'
    values of one tensor.
    """

    exact = False
    linear = False
    hetero_rank = False
    asynchronous = False
    privacy = frozenset({"record"})
    waives: Mapping[str, str] = {
        "heads": "heads are merged element by element, as every tensor",
        "split": "clients count alike, whatever their weight",
        "zero-weight": "clients count alike, whatever their weight",
    }

    @abstractmethod
    def merge(self, values: Tensor) -> Tensor:
        """One tensor (...) of all clients' (n, ...), which are sorted along the first axis."""

    def check(self, given: Conditions) -> None:
        super().check(given)
        *_, core = self.inside()
        if core.budgets:
            raise ConfigError(
                f"wrapper {self.name!r} compares tensors element by element, but with strategy "
                f"{core.name!r} clients choose which rank slots they send; choose krum or "
                'geometric-median with space = "product"'
            )
        if given.compression.up.top_k < 1:
            raise ConfigError(
                f"wrapper {self.name!r} compares tensors element by element, but with "
                f"compression.top_k = {given.compression.up.top_k:g} clients choose which entries "
                "they send, and the others would pass for zero; set compression.top_k = 1, or "
                "choose multi-krum or norm-cap"
            )
        if any(isinstance(strategy, Scaffold) for strategy in self.inside()):
            raise ConfigError(
                f"wrapper {self.name!r} makes one update of all, but scaffold inside it counts "
                "clients' control variates; choose multi-krum or norm-cap, or leave scaffold out"
            )

    def screen(self, state: StrategyState, updates: Updates) -> tuple[Updates, dict[str, Any]]:
        if not updates:
            return updates, {}
        first = updates[0]
        for update in updates:
            if update.delta.spec != first.delta.spec or update.slots is not None:
                raise StrategyError(
                    f"wrapper {self.name!r} compares tensors element by element, but client "
                    f"{update.client!r} sent other rank slots than the others; choose krum or "
                    'geometric-median with space = "product"'
                )
        deltas = [update.delta.tensors for update in updates]

        def read(name: str) -> Tensor:
            values = torch.stack([delta[name].double() for delta in deltas])  # (n, ...)
            return self.merge(values.sort(0).values)

        merged = replace(
            with_delta(first, read),
            client=self.name,
            weight=sum(update.weight for update in updates),
            num_examples=sum(update.num_examples for update in updates),
            metrics={},
        )
        return [merged], {}


class CoordinateMedian(Coordinate):
    """The median of every element; the mean of the middle two of an even number."""

    name = "coordinate-median"

    def merge(self, values: Tensor) -> Tensor:
        n = values.shape[0]
        return (values[(n - 1) // 2] + values[n // 2]) / 2


class TrimmedMean(Coordinate):
    """The mean of every element without the floor(fraction * n) lowest and highest.

    Options:
        fraction: beta, at least the part of clients that may be hostile, below one half.
    """

    name = "trimmed-mean"
    options: ClassVar[Mapping[str, Any]] = {"fraction": 0.2}

    def __init__(self, inner: Strategy, options: Mapping[str, Any] | None = None) -> None:
        super().__init__(inner, options)
        if not 0 <= self.settings["fraction"] < 0.5:
            raise ConfigError(
                f"federation.wrappers.trimmed-mean.fraction = {self.settings['fraction']:g}; "
                "expected 0 <= fraction < 0.5, for it is cut off at both ends"
            )

    def merge(self, values: Tensor) -> Tensor:
        n = values.shape[0]
        # 0.29 * 100 is 28.999... in binary
        cut = math.floor(self.settings["fraction"] * n + 1e-9)
        return values[cut : n - cut].mean(0)
