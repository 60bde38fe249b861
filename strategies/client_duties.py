"""What a strategy asks of clients beyond training some factors and sending them back.

A client that is not fedlora's own does none of it, so a strategy that asks for any is refused
for such clients, before they have trained in vain.
"""

from contextlib import suppress
from dataclasses import fields

import torch

from fedlora.adapter import AdapterSpec, AdapterState, trained_shapes
from fedlora.adapters.base import Method
from fedlora.errors import ConfigError, FedloraError
from fedlora.messages import ClientUpdate, RoundPlan, Start
from fedlora.seeds import generator
from fedlora.strategies.base import ClientInfo, Conditions, Strategy, StrategyState

_DUTIES = {
    "control": "corrects its gradients by control variates",
    "fresh": "draws factors from a seed",
    "kept": "keeps a part of the adapter to itself",
    "proximal": "adds a penalty to its loss",
    "proximal_product": "adds a penalty to its loss",
    "rank": "trains another rank than it holds",
    "rates": "has a learning rate for each factor",
    "slots": "chooses rank slots to train",
    "tail_slot": "adds a penalty to its loss",
    "tail_weight": "adds a penalty to its loss",
    "trial_steps": "chooses rank slots to train",
}
# a robust wrapper wants several
_PROBES = 8


def hand_out(strategy: Strategy, state: StrategyState) -> tuple[RoundPlan, Start]:
    """Plan and start of the next round, the same for all clients.

    Raises:
        ConfigError: they ask for more than training some factors.
    """
    rank = state.spec.rank
    client = ClientInfo("client", rank)
    blank = RoundPlan("", state.round + 1, 0, client.name, (), rank, 0)
    plan = strategy.plan(state, client, blank)
    start = strategy.broadcast(state, client)
    duties = [
        _DUTIES.get(field.name, f"obeys {field.name}")
        for field in fields(plan)
        if field.name != "factors" and getattr(plan, field.name) != getattr(blank, field.name)
    ]
    if start.fold:
        duties.append("adds a low-rank change to its frozen base weights")
    if start.control:
        duties.append(_DUTIES["control"])
    if duties:
        raise ConfigError(
            f"strategy {strategy.name!r} needs a client that {duties[0]}, and the clients of a "
            "Flower app of your own do not; choose fedit, ffa-lora, rolora, flexlora, lora-fair, "
            "lora-lego or fedsvd, or run the job with fedlora, whose clients do"
        )
    return plan, start


def check_duties(strategy: Strategy, method: Method, rank: int) -> None:
    """Refuses a strategy by what it asks of clients, in two rounds of a small random adapter.

    Raises:
        ConfigError: see `hand_out` and `Strategy.check`.
    """
    width = 2 * rank + 2
    layers = method.plan({"probe": (width, width)}, rank, float(rank), {})
    spec = AdapterSpec(method.name, rank, float(rank), layers, (), {}, "", 0)
    strategy.check(Conditions(spec, [rank] * _PROBES))
    tensors = {f"probe.{k}": tensor for k, tensor in method.fresh(layers[0], 0).items()}
    state = strategy.init(AdapterState(spec, tensors))
    plan, start = hand_out(strategy, state)
    shapes = trained_shapes(spec, method, plan.factors)
    updates = []
    for number in range(_PROBES):
        draws = generator(0, "probe", number)
        delta = {name: torch.randn(shape, generator=draws) for name, shape in shapes.items()}
        updates.append(
            ClientUpdate(
                run="",
                round=1,
                attempt=0,
                client=f"probe-{number}",
                start_sha256="",
                delta=AdapterState(spec, delta),
                num_examples=1.0,
                start=start.adapter,
                weight=1.0,
            )
        )
    # a wrapper may want more clients than these; the real rounds are checked as well
    with suppress(FedloraError):
        state = strategy.refactor(state, strategy.reduce(state, updates))
    hand_out(strategy, state)
