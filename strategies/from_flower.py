"""Stock strategies of Flower as strategies of fedlora: `federation.strategy = "flwr:FedAdam"`.

Beutel et al., "Flower: A Friendly Federated Learning Research Framework",
https://arxiv.org/abs/2007.14390; the classes are those of `flwr.serverapp.strategy`, whose
docstrings name the paper of each.

Every factor and head is one array. A fresh Flower object is made for each round, given the
global arrays by its own `configure_train` and the replies by its own `aggregate_train`; what
it keeps from round to round is written into the strategy's state afterwards, and back before
the next round. So nothing outlives a round but the state, and a resumed run has the same bits.

- A rule that works on the mean alone (FedAvg, FedAvgM, FedProx, FedAdam, FedAdagrad, FedYogi)
  is handed one reply, the mean, whose own mean it is. It stays linear, and the memory it
  needs does not grow with the clients.
- Any other rule is handed all replies, and holds them all in memory.

Flower computes in the number format of the arrays. They are float64 here: Krum's distances
||x||^2 + ||y||^2 - 2 x.y leave nothing in float32 of updates that are small beside the
parameters. What is kept is rounded to float32 between rounds, as all of a state is.
"""

import inspect
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, ClassVar

import flwr.serverapp.strategy as stock
import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.app.metadata import Metadata
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from torch import Tensor

from fedlora.adapter import MethodTraits, Tensors, trained_shapes
from fedlora.errors import ConfigError, StrategyError, near_miss
from fedlora.messages import RoundPlan
from fedlora.strategies.base import ClientInfo, Stats, Strategy, StrategyState, Updates
from fedlora.strategies.flower_rules import NOT_HERE, REFUSED, RULES, Rule

PREFIX = "flwr:"
KEPT = "flower."
WEIGHT = "num-examples"


class FlowerStrategy(Strategy):
    """One stock class of Flower; `flower_strategy` makes a subclass for each.

    Attributes:
        flower: the class.
        rule: what the bridge knows of it.

    Raises:
        ConfigError: an unknown option or one of another type, or a value Flower refuses.
    """

    flower: ClassVar[type[stock.FedAvg]]
    rule: ClassVar[Rule]
    exact = False
    hetero_rank = False

    def __init__(self, traits: MethodTraits, options: Mapping[str, Any] | None = None) -> None:
        for key in options or {}:
            if key in NOT_HERE and key in inspect.signature(self.flower).parameters:
                known = ", ".join(self.options) or "none"
                raise ConfigError(
                    f"federation.strategy_options.{key} of {self.name} has no meaning here: "
                    f"{NOT_HERE[key]}; {self.name} takes: {known}"
                )
        super().__init__(traits, options)
        asked = ConfigRecord()
        try:
            self._made(1, ArrayRecord(), asked)
        except (TypeError, ValueError) as e:
            raise ConfigError(f"federation.strategy_options: {self.name} refuses them: {e}") from e
        # FedProx has one word for its clients; whatever else was asked would not be heard
        mu = asked.pop("proximal-mu", 0.0)
        assert set(asked) == {"server-round"}, f"{self.name} asks clients for {sorted(asked)}"
        assert isinstance(mu, float | int)
        if mu < 0:
            raise ConfigError(
                f"federation.strategy_options.proximal_mu = {mu:g}; expected 0 or more"
            )
        self.proximal = float(mu)

    def factors(self, state: StrategyState) -> tuple[str, ...]:
        return tuple(sorted(self.traits.factor_shapes(state.spec.layers[0])))

    def plan(self, state: StrategyState, client: ClientInfo, plan: RoundPlan) -> RoundPlan:
        """All factors, and FedProx's mu, which is half of that algorithm."""
        return replace(super().plan(state, client, plan), proximal=self.proximal)

    def reduce(self, state: StrategyState, updates: Updates) -> Stats:
        """The weighted sum; for a rule that needs all replies, its result (weight 1).

        A rule that gives no result, as Bulyan with fewer than 4f + 3 replies, leaves the
        global adapter as it is, and a note.
        """
        if self.rule.mean:
            return super().reduce(state, updates)
        replies = [(update.trained, update.weight) for update in updates]
        result = self._aggregate(state, replies)
        if result is None:
            why = f"{self.name} gave no result for {len(updates)} updates; nothing was merged"
            return Stats({}, 1.0, notes={self.name: why})
        return Stats(result, 1.0)

    def refactor(self, state: StrategyState, stats: Stats) -> StrategyState:
        """The next state: Flower's arrays, and what it keeps for its next round."""
        if not self.rule.mean:
            return super().refactor(state, stats)
        result = self._aggregate(state, [(stats.mean(), stats.weight)])
        if result is None:
            raise StrategyError(f"{self.name} gave no result")
        return self.advance(state, {name: tensor.float() for name, tensor in result.items()})

    def _made(self, number: int, arrays: ArrayRecord, config: ConfigRecord) -> stock.FedAvg:
        """A fresh Flower object that has been told the global arrays of round `number`."""
        with _quiet():
            made = self.flower(**self.settings, min_train_nodes=0, min_available_nodes=0)
            made.configure_train(number, arrays, config, _NoNodes())
        return made

    def _aggregate(
        self, state: StrategyState, replies: Sequence[tuple[Tensors, float]]
    ) -> dict[str, Tensor] | None:
        """Flower's result for (tensors, weight) of each reply, and what it keeps; float64."""
        names = list(trained_shapes(state.spec, self.traits))
        flower = self._made(state.round + 1, _record(state.tensors, names), ConfigRecord())
        self._restore(flower, state.tensors, names)
        before = dict(vars(flower))
        # a generator would be empty when Flower goes over it twice
        messages = [_reply(_record(t, names), w, i) for i, (t, w) in enumerate(replies)]
        with _quiet():
            arrays, _ = flower.aggregate_train(state.round + 1, messages)
        if arrays is None:
            return None
        known = {*self.rule.kept, "current_arrays"}
        changed = [k for k, v in vars(flower).items() if k not in known and v is not before.get(k)]
        if changed:
            raise StrategyError(
                f"this version of Flower's {self.flower.__name__} keeps {', '.join(changed)}, "
                "which no checkpoint would hold; install flwr 1.41"
            )
        if set(arrays) != set(names):
            raise StrategyError(f"{self.name} returned other arrays than it was given")
        result = {name: torch.from_numpy(arrays[name].numpy().copy()) for name in names}
        for attribute in self.rule.kept:
            value = getattr(flower, attribute)
            if value is not None:
                named = value if isinstance(value, dict) else dict(zip(names, value, strict=True))
                for name, array in named.items():
                    result[f"{KEPT}{attribute}.{name}"] = torch.from_numpy(np.array(array))
        return result

    def _restore(self, flower: stock.FedAvg, tensors: Tensors, names: Sequence[str]) -> None:
        for attribute in self.rule.kept:
            if f"{KEPT}{attribute}.{names[0]}" not in tensors:
                continue
            arrays = {name: tensors[f"{KEPT}{attribute}.{name}"].double().numpy() for name in names}
            listed = attribute == "momentum_vector"
            setattr(flower, attribute, list(arrays.values()) if listed else arrays)


def flower_strategy(name: str) -> type[Strategy]:
    """The strategy class that `federation.strategy = "flwr:..."` means.

    Raises:
        ConfigError: no stock class of that name, or one whose rule has no meaning here.
    """
    flower = name.removeprefix(PREFIX)
    if flower in REFUSED:
        raise ConfigError(f'federation.strategy = "{name}": {flower} {REFUSED[flower]}')
    if flower not in RULES:
        raise ConfigError(
            f'federation.strategy = "{name}" is not known{near_miss(flower, RULES)}; known: '
            f"{', '.join(PREFIX + known for known in RULES)}"
        )
    found = getattr(stock, flower)
    rule = RULES[flower]
    parameters = inspect.signature(found).parameters
    attributes = {
        "__doc__": f"Flower's {flower}.",
        "name": name,
        "flower": found,
        "rule": rule,
        "linear": rule.mean,
        "waives": rule.waives,
        "privacy": frozenset({"record", "client"} if rule.mean else {"record"}),
        "options": {k: p.default for k, p in parameters.items() if k not in NOT_HERE},
    }
    return type(f"Flower{flower}", (FlowerStrategy,), attributes)


def _record(tensors: Tensors, names: Iterable[str]) -> ArrayRecord:
    return ArrayRecord({name: Array(tensors[name].double().numpy()) for name in names})


def _reply(arrays: ArrayRecord, weight: float, number: int) -> Message:
    content = RecordDict({"arrays": arrays, "metrics": MetricRecord({WEIGHT: weight})})
    # no Flower task runs in this process that could lend a message its identity
    metadata = Metadata(
        run_id=0,
        message_id=str(number),
        src_node_id=number + 1,
        dst_node_id=0,
        reply_to_message_id=str(number),
        group_id="",
        created_at=0.0,
        ttl=1.0,
        message_type="train",
    )
    fields: dict[str, Any] = {"content": content, "metadata": metadata}
    return Message(**fields)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without Flower's log of rounds, which this program reports itself."""
    logger = logging.getLogger("flwr")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


class _NoNodes(Grid):
    """A grid without nodes: `configure_train` then notes the arrays and sends nothing."""

    def set_run(self, run: Run) -> None:
        raise NotImplementedError

    @property
    def run(self) -> Run:
        raise NotImplementedError

    def create_message(self, *_args: Any, **_kwargs: Any) -> Message:
        raise NotImplementedError

    def get_node_ids(self) -> Iterable[int]:
        return []

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        raise NotImplementedError

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        raise NotImplementedError

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        raise NotImplementedError
