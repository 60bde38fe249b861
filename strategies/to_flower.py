"""Strategies of fedlora inside a Flower app: `as_flower` gives a `flwr` strategy.

Beutel et al., "Flower: A Friendly Federated Learning Research Framework",
https://arxiv.org/abs/2007.14390. The app's clients train LoRA adapters with whatever library
they like and exchange one ArrayRecord, whose names `fedlora.strategies.lora_arrays` reads.

Differs from Flower's own strategies: every reply is checked by itself, and one that does not
fit counts as a failed client, as it does in fedlora's own rounds. Flower's check compares the
names of all replies, does not look at shapes or numbers, and ends the app at a mismatch.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from logging import INFO, WARNING
from typing import Any

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg
from flwr.supercore import log
from torch import Tensor

from fedlora.adapter import AdapterState, Tensors
from fedlora.adapters import METHODS
from fedlora.errors import ConfigError, StrategyError, UpdateRejected
from fedlora.messages import ClientUpdate, LazyTensors
from fedlora.strategies.base import Strategy, StrategyState
from fedlora.strategies.client_duties import check_duties, hand_out
from fedlora.strategies.flower_replies import comparable, moved_square, read_tensor
from fedlora.strategies.lora_arrays import Naming, Shapes, read_arrays
from fedlora.strategies.plugin import find_strategy

FACTORS = "fedlora-factors"
_PROBE_RANK = 4


def as_flower(
    strategy: Strategy | type[Strategy] | str,
    *,
    rank: int | None = None,
    alpha: float | None = None,
    options: Mapping[str, Any] | None = None,
    seed: int = 0,
    max_update_norm: float = 1e4,
    max_examples: float = 1e7,
    **flower: Any,
) -> "FedloraStrategy":
    """A fedlora strategy as a strategy of a Flower app whose clients train LoRA adapters.

    Args:
        strategy: an instance for method lora or rslora (wrappers too), or a class or name,
            which is made for method lora.
        rank: of every LoRA layer; by default that of the initial arrays.
        alpha: numerator of the clients' scale (`lora_alpha`); by default the rank. It matters
            to strategies that weigh the sizes of the factors.
        options: options of a strategy given by class or name.
        seed: seed of whatever the strategy draws.
        max_update_norm: a reply that moved further (L2 norm over all arrays) is refused.
        max_examples: a reply that claims more examples is refused.
        flower: arguments of `flwr.serverapp.strategy.FedAvg`, such as `fraction_train`.

    Raises:
        ConfigError: an unknown strategy or option, a strategy that needs clients of fedlora's
            own (with what they would have to do), or another adapter method.
    """
    if isinstance(strategy, str):
        if strategy.startswith("flwr:"):
            raise ConfigError(f'"{strategy}" is Flower\'s own; give its class to the app as it is')
        strategy = find_strategy(strategy)
    if isinstance(strategy, type):
        strategy = strategy(METHODS["lora"], options)
    elif options:
        raise ConfigError("options are for a strategy given by class or name; this one has its own")
    if not strategy.traits.product:
        raise ConfigError(
            f"strategy {strategy.name!r} is made for method {strategy.traits.name!r}; a Flower "
            "app exchanges adapters of method lora or rslora"
        )
    check_duties(strategy, METHODS[strategy.traits.name], rank or _PROBE_RANK)
    return FedloraStrategy(
        strategy,
        rank,
        alpha,
        seed,
        max_update_norm=max_update_norm,
        max_examples=max_examples,
        **flower,
    )


class FedloraStrategy(FedAvg):
    """FedAvg's sampling and evaluation around a fedlora strategy; see `as_flower`.

    Clients are told in `config` which factors to train, as "fedlora-factors" (["lora_A",
    "lora_B"] by PEFT's names, or ["A", "B"]). A factor that is not in the list keeps its
    value whatever they send. Strategies that make factors anew (flexlora, lora-lego, fedsvd)
    want an optimiser without memory of earlier rounds.

    Attributes:
        state: the strategy's state; None before the first round. It goes on from round to
            round as long as the arrays given are those it made, and begins anew otherwise.
            To go on in another process, save its round, tensors and extra, and set it there.
        rejected: the replies of the latest round that were not used, and why.
    """

    def __init__(
        self,
        strategy: Strategy,
        rank: int | None,
        alpha: float | None,
        seed: int,
        *,
        max_update_norm: float,
        max_examples: float,
        **flower: Any,
    ) -> None:
        super().__init__(**flower)
        self.strategy = strategy
        self.state: StrategyState | None = None
        self.rejected: list[UpdateRejected] = []
        self._rank, self._alpha, self._seed = rank, alpha, seed
        self._max_update_norm, self._max_examples = max_update_norm, max_examples

    def summary(self) -> None:
        """Log summary configuration of the strategy."""
        log(INFO, "\t├──> fedlora: %s %s", self.strategy.name, dict(self.strategy.settings))
        super().summary()

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """FedAvg's messages, with what the strategy sends out, and which factors to train.

        Raises:
            ConfigError: the arrays are no LoRA adapter, or the strategy needs other clients.
        """
        state, naming = self._begin(arrays)
        self.rejected = []
        plan, start = hand_out(self.strategy, state)
        factors = [naming.factor(name) for name in plan.factors]
        told = ConfigRecord({**config, FACTORS: factors})
        return super().configure_train(
            server_round, _arrays(start.adapter.tensors, naming), told, grid
        )

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The strategy's next arrays; None when no reply can be used.

        Raises:
            StrategyError: the strategy made something that is not finite.
        """
        if self.state is None:
            raise StrategyError("aggregate_train was called before configure_train")
        state, naming = self.state, self._naming
        plan, start = hand_out(self.strategy, state)
        expected = self.strategy.expect(state, plan)
        updates: dict[str, ClientUpdate] = {}

        def admit(message: Message, client: str) -> None:
            updates[client] = self._update(message, client, start.adapter, expected)

        contents = self._screen(replies, "aggregate_train", admit)
        if not updates:
            return None, None
        ordered = [updates[client] for client in sorted(updates)]
        new = self.strategy.refactor(state, self.strategy.reduce(state, ordered))
        for name, tensor in new.tensors.items():
            if not bool(torch.isfinite(tensor).all()):
                raise StrategyError(f"tensor {name} is not finite after round {server_round}")
        self.state = new
        arrays = _arrays(self.strategy.adapter(new).tensors, naming)
        return arrays, self.train_metrics_aggr_fn(contents, self.weighted_by_key)

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """The metrics that all usable replies have, averaged as FedAvg does."""
        contents = self._screen(replies, "aggregate_evaluate", self._weight)
        if not contents:
            return None
        return self.evaluate_metrics_aggr_fn(contents, self.weighted_by_key)

    def _begin(self, arrays: ArrayRecord) -> tuple[StrategyState, Naming]:
        """The state that these arrays belong to."""
        tensors = {}
        for key in arrays:
            tensor = read_tensor(arrays[key])
            if tensor.dtype != torch.float32:
                raise ConfigError(
                    f"array {key} has dtype {tensor.dtype}; expected float32, in which small "
                    "updates are not lost"
                )
            tensors[key] = tensor
        method = METHODS[self.strategy.traits.name]
        shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
        spec, naming = read_arrays(shapes, method, self._rank, self._alpha, self._seed)
        named = {own: tensors[key] for key, own in naming.names.items()}
        self._naming = naming
        if self.state is not None:
            held = self.strategy.adapter(self.state).tensors
            if held.keys() == named.keys() and all(torch.equal(held[k], named[k]) for k in held):
                return self.state, naming
        self.state = self.strategy.init(AdapterState(spec, named))
        return self.state, naming

    def _screen(
        self, replies: Iterable[Message], step: str, admit: Callable[[Message, str], object]
    ) -> list[RecordDict]:
        """The contents of the replies that `admit` takes, reduced to the metrics all have."""
        passed: dict[str, RecordDict] = {}
        failures = 0
        for message in replies:
            # padded, so that names sort as numbers do
            client = f"{message.metadata.src_node_id:020d}"
            try:
                if message.has_error():
                    raise UpdateRejected(client, "CLIENT_ERROR", str(message.error.reason))
                if client in passed:
                    raise UpdateRejected(client, "STALE", "a second reply in one round")
                admit(message, client)
            except UpdateRejected as e:
                failures += 1
                self.rejected.append(e)
                log(WARNING, "%s: %s", step, e)
                continue
            passed[client] = message.content
        log(INFO, "%s: %s usable replies, %s failures", step, len(passed), failures)
        return comparable([passed[client] for client in sorted(passed)])

    def _weight(self, message: Message, client: str) -> float:
        """A reply's number of examples."""
        records = list(message.content.metric_records.values())
        if len(records) != 1:
            raise UpdateRejected(client, "MANIFEST", f"{len(records)} MetricRecords; expected one")
        found = records[0].get(self.weighted_by_key)
        if not isinstance(found, int | float) or not 0 < found <= self._max_examples:
            raise UpdateRejected(
                client,
                "WEIGHT",
                f"{self.weighted_by_key} is {found!r}; expected 0 < n <= {self._max_examples:g}",
            )
        return float(found)

    def _update(
        self, message: Message, client: str, begin: AdapterState, sent: Shapes
    ) -> ClientUpdate:
        """A training reply as an update; its arrays are read when they are asked for.

        Args:
            begin: what the client was given.
            sent: the tensors that it was to train.
        """
        weight = self._weight(message, client)
        records = list(message.content.array_records.values())
        if len(records) != 1:
            raise UpdateRejected(client, "MANIFEST", f"{len(records)} ArrayRecords; expected one")
        record = records[0]
        names = self._naming.names
        if odd := sorted(record.keys() ^ names.keys()):
            why = "was not asked for" if odd[0] in record else "is missing"
            raise UpdateRejected(client, "HEADER", f"array {odd[0]} {why}")
        keys = {own: key for key, own in names.items()}

        def moved(name: str) -> Tensor:
            return read_tensor(record[keys[name]]) - begin.tensors[name]

        squares, ignored = 0.0, []
        for name, key in keys.items():
            square = moved_square(record[key], begin.tensors[name], client, key)
            if name in sent:
                squares += square
            elif square:
                ignored.append(key)
        if ignored:
            log(WARNING, "client %s trained %s, which is frozen; ignored", client, ignored[0])
        if math.sqrt(squares) > self._max_update_norm:
            raise UpdateRejected(
                client,
                "NORM",
                f"moved by {math.sqrt(squares):.4g}; max_update_norm is {self._max_update_norm:g}",
            )
        return ClientUpdate(
            run="",
            round=0,
            attempt=0,
            client=client,
            start_sha256="",
            delta=AdapterState(begin.spec, LazyTensors(sent, moved)),
            num_examples=weight,
            start=begin,
            weight=weight,
        )


def _arrays(tensors: Tensors, naming: Naming) -> ArrayRecord:
    return ArrayRecord({key: Array(tensors[own].numpy()) for key, own in naming.names.items()})
