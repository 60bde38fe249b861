"""A small federation without a model: made-up updates and their dense float64 reference.

Updates are plain dicts of random tensors, so that a strategy is held against what its
functions say and not against what happens to be trained. Everything is drawn from named
seeds, hence a law that is broken once is broken every time.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from fedlora.adapter import (
    AdapterSpec,
    AdapterState,
    LayerSpec,
    MethodTraits,
    split_name,
    tensors_digest,
    trained_shapes,
    with_rank,
)
from fedlora.errors import ConfigError
from fedlora.messages import CONTROL, HEADS, ClientUpdate, Pair, RoundPlan
from fedlora.seeds import generator
from fedlora.strategies.base import ClientInfo, Conditions, Strategy, StrategyState

# d = k, and two that are not square; four clients of rank 4 stack to more than min(d, k) = 8
# in the first and third layer, and to less in the second
LAYERS = {"attn.q": (8, 8), "mlp.down": (24, 20), "mlp.up": (8, 16)}
HEAD_SHAPES = {"head.bias": (3,), "head.weight": (3, 5)}
RANK = 4
MIXED = (4, 2, 1, 4)
NAMES = ("ann", "bob", "cyd", "dan")
WEIGHTS = (3.0, 1.0, 7.5, 2.0)


class Method(MethodTraits, Protocol):
    """What the suite asks of an adapter method, beyond what a strategy may know."""

    def plan(
        self,
        shapes: Mapping[str, tuple[int, int]],
        rank: int,
        alpha: float,
        options: Mapping[str, Any],
    ) -> tuple[LayerSpec, ...]:
        """One spec per layer."""
        ...

    def check_options(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """`options` completed by the defaults."""
        ...

    def make_basis(
        self,
        layers: tuple[LayerSpec, ...],
        weight: Callable[[str], Tensor],
        seed: int,
        options: Mapping[str, Any],
    ) -> dict[str, Tensor]:
        """Frozen tensors beside W0."""
        ...

    def lowrank(
        self, layer: LayerSpec, factors: Mapping[str, Tensor], basis: Mapping[str, Tensor]
    ) -> Pair | None:
        """(L (d, R), Q (R, k)) of the weight change; None when it needs W0."""
        ...


Maker = Callable[[MethodTraits], Strategy]


def randn(shape: Sequence[int], *names: str | int) -> Tensor:
    """Standard normal float64 numbers of the stream called `names`."""
    return torch.randn(tuple(shape), generator=generator(0, *names), dtype=torch.float64)


class Federation:
    """A strategy with one adapter method and four clients.

    Args:
        make: makes a new instance of the strategy for an adapter method.
        methods: adapter methods by name.
        method: name of the one that is used.
        ranks: of the clients.
        layers: layer -> (d, k).
        head_shapes: of the heads.
        rank: of the adapter.
        drawn_basis: the method's frozen tensors are made; they cost a decomposition of every
            layer, and no strategy sees them.
    """

    def __init__(
        self,
        make: Maker,
        methods: Mapping[str, Method],
        method: str,
        ranks: Sequence[int] = (RANK,) * len(NAMES),
        *,
        layers: Mapping[str, tuple[int, int]] = LAYERS,
        head_shapes: Mapping[str, tuple[int, ...]] = HEAD_SHAPES,
        rank: int = RANK,
        drawn_basis: bool = True,
    ) -> None:
        self._make = make
        self.methods = methods
        self.method = methods[method]
        self.ranks = tuple(ranks)
        self._layers = layers
        self._head_shapes = head_shapes
        self._rank = rank
        self._drawn_basis = drawn_basis

    def unchecked(self) -> Strategy:
        """A new instance that has not been told of the federation."""
        return self._make(self.method)

    def strategy(self) -> Strategy:
        """A new instance that has checked the federation, as every run's has before round 1.

        Raises:
            ConfigError, AdapterError: it refuses.
        """
        strategy = self.unchecked()
        admit(self, strategy)
        return strategy

    @property
    def clients(self) -> list[ClientInfo]:
        """The clients, ordered by name."""
        return [ClientInfo(name, rank) for name, rank in zip(NAMES, self.ranks, strict=True)]

    @cached_property
    def basis(self) -> dict[str, Tensor]:
        """The method's frozen tensors, of a random base."""
        if not self._drawn_basis:
            return {}
        spec = self._bare_spec

        def weight(name: str) -> Tensor:
            layer = spec.layer(name)
            return randn((layer.out, layer.inp), "base", name).float()

        return self.method.make_basis(spec.layers, weight, spec.seed, spec.options)

    @cached_property
    def spec(self) -> AdapterSpec:
        """The global adapter's spec, its basis digest included."""
        digest = tensors_digest(self.basis) if self.basis else ""
        return replace(self._bare_spec, basis_digest=digest)

    @cached_property
    def _bare_spec(self) -> AdapterSpec:
        options = self.method.check_options({})
        alpha = 2.0 * self._rank  # s = 2 for lora: a strategy that forgets s shows
        layers = self.method.plan(self._layers, self._rank, alpha, options)
        heads = tuple(sorted({split_name(name)[0] for name in self._head_shapes}))
        return AdapterSpec(
            method=self.method.name,
            rank=self._rank,
            alpha=alpha,
            layers=layers,
            heads=heads,
            head_shapes=dict(self._head_shapes),
            base_fingerprint="conformance",
            seed=0,
            options=options,
        )

    @cached_property
    def adapter(self) -> AdapterState:
        """Random factors and heads, but for the zero-initialised factor of a bilinear method."""
        shapes = trained_shapes(self.spec, self.method)
        zero = self.method.bilinear_factors[0] if self.method.bilinear_factors else None
        tensors = {
            name: torch.zeros(shape)
            if split_name(name)[1] == zero and name not in self.spec.head_shapes
            else (0.5 * randn(shape, "start", name)).float()
            for name, shape in shapes.items()
        }
        return AdapterState(self.spec, tensors)

    def plan(self, strategy: Strategy, state: StrategyState, client: ClientInfo) -> RoundPlan:
        """The strategy's plan for a client, made as the round loop makes it."""
        blank = RoundPlan("run", state.round + 1, 0, client.name, (), client.rank, 1)
        return strategy.plan(state, client, blank)

    def update(
        self,
        strategy: Strategy,
        state: StrategyState,
        client: ClientInfo,
        weight: float,
        *,
        seed: str,
        size: float = 0.3,
    ) -> ClientUpdate:
        """A client that moved every tensor it was to send by `size` times random numbers."""
        plan = self.plan(strategy, state, client)
        start = strategy.broadcast(state, client)
        own = start.adapter.spec
        moved: dict[str, Tensor] = {}
        control: dict[str, Tensor] = {}
        for name, shape in strategy.expect(state, plan).items():
            step = (size * randn(shape, "update", state.round, seed, name)).float()
            if name.startswith(CONTROL):
                control[name.removeprefix(CONTROL)] = step
            else:
                moved[name] = step
        masks = None
        if plan.slots:
            masks = _masks(own, plan.slots, seed)
            for layer, mask in zip(own.layers, masks, strict=True):
                held = torch.tensor([float(mask >> slot & 1) for slot in range(layer.rank)])
                for factor, axis in (("A", (-1, 1)), ("B", (1, -1))):
                    if (name := f"{layer.name}.{factor}") in moved:
                        moved[name] = moved[name] * held.reshape(axis)
        return ClientUpdate(
            run="run",
            round=state.round + 1,
            attempt=0,
            client=client.name,
            start_sha256="",
            delta=AdapterState(own, moved),
            num_examples=weight,
            metrics={"train_loss": 1.0},
            control=control,
            slots=masks,
            start=start.adapter,
            weight=weight,
        )

    def cohort(
        self, strategy: Strategy, state: StrategyState, *, size: float = 0.3, only: str = ""
    ) -> list[ClientUpdate]:
        """Updates of all clients, or of those in `only`, ordered by name."""
        return [
            self.update(strategy, state, client, weight, seed=client.name, size=size)
            for client, weight in zip(self.clients, WEIGHTS, strict=True)
            if not only or client.name in only.split()
        ]

    def round(
        self, strategy: Strategy, state: StrategyState, updates: Sequence[ClientUpdate]
    ) -> StrategyState:
        """The state one round later."""
        return strategy.refactor(state, strategy.reduce(state, updates))

    def walk(self) -> Iterator[StrategyState]:
        """The states before rounds 1 to 3, all clients taking part; each is made when asked for."""
        strategy = self.strategy()
        state = strategy.init(self.adapter)
        yield state
        for _ in range(2):
            state = self.round(strategy, state, self.cohort(strategy, state))
            yield state


def admit(federation: Federation, strategy: Strategy) -> None:
    """The strategy's own `check`, with the usual optimiser, or else with the plain one.

    Raises:
        ConfigError, AdapterError: the strategy refuses.
    """
    given = Conditions(federation.spec, federation.ranks)
    try:
        strategy.check(given)
    except ConfigError:
        strategy.check(replace(given, optimizer="sgd"))


def expected_shapes(
    strategy: Strategy, state: StrategyState, plan: RoundPlan
) -> dict[str, tuple[int, ...]]:
    """What a client with this plan sends, by the protocol and not by the strategy."""
    spec = with_rank(state.spec, plan.rank)
    if HEADS in plan.kept:
        spec = replace(spec, head_shapes={})
    shapes = trained_shapes(spec, strategy.traits, plan.sent)
    if plan.control:
        shapes |= {f"{CONTROL}{name}": shape for name, shape in shapes.items()}
    return shapes


def _masks(spec: AdapterSpec, budget: int, seed: str) -> tuple[int, ...]:
    """`budget` slots chosen at random over all layers, one bit mask per layer."""
    slots = [(i, slot) for i, layer in enumerate(spec.layers) for slot in range(layer.rank)]
    order = torch.randperm(len(slots), generator=generator(0, "slots", seed)).tolist()
    masks = [0] * len(spec.layers)
    for index in order[:budget]:
        layer, slot = slots[index]
        masks[layer] |= 1 << slot
    return tuple(masks)
