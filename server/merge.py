"""Merge: from the updates of a round to its committed state."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from fedlora.adapter import AdapterState, LayerSpec, tensors_digest
from fedlora.messages import ClientUpdate
from fedlora.server.aggregation_error import Trained, aggregation_error
from fedlora.server.guard import starts, strategy_errors
from fedlora.server.interrupt import shielded
from fedlora.server.journal import Event
from fedlora.server.run_parts import RunParts
from fedlora.server.soundness import checked_adapter, checked_notes, checked_state
from fedlora.strategies.base import StrategyState
from fedlora.strategies.fold import folded


class Stopwatch:
    """Seconds per stage of a round."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - started


@dataclass(frozen=True)
class Received:
    """What came in for one round.

    Attributes:
        updates: the admitted updates, by client name.
        rejected: events of the others.
        missing: clients of which nothing came.
        bytes_up, bytes_down: of the round.
        attempt: number of the attempt.
        event: further fields of the round's event.
        record: further fields of the round's record.
        senders: who sent what, without tensors, when `updates` are sums over several clients;
            None when each update is its sender's own.
        comparable: all updates started from the present version, so that an aggregation
            error can be measured.
    """

    updates: Sequence[ClientUpdate]
    rejected: Sequence[Event]
    missing: Sequence[str]
    bytes_up: int
    bytes_down: int
    attempt: int = 0
    event: Mapping[str, Any] = field(default_factory=dict)
    record: Mapping[str, Any] = field(default_factory=dict)
    comparable: bool = True
    senders: Sequence[ClientUpdate] | None = None


def merge(
    run: RunParts, state: StrategyState, received: Received, timed: Stopwatch
) -> StrategyState:
    """Reduces, refactors, measures, commits and reports a round; returns its state.

    Raises:
        StrategyError: the strategy failed, or made something unusable.
        StorageError: the disk refused.
    """
    given = starts(received.updates)
    with timed("reduce"), strategy_errors(run.strategy, state, "reduce", given):
        stats = run.strategy.reduce(state, received.updates)
        notes = checked_notes(stats)
    with timed("refactor"):
        with strategy_errors(run.strategy, state, "refactor", given):
            new = checked_state(state, run.strategy.refactor(state, stats))
        next_state = {"the next state": new.tensors}
        with strategy_errors(run.strategy, state, "global_delta", next_state):
            adapter = checked_adapter(run.strategy.global_delta(new))
    with timed("aggregation_error"):
        error = _error(run, state, received, adapter)
    settings = run.settings
    scores: Mapping[str, float] = {}
    if run.evaluate is not None and (
        new.round % settings.evaluate_every == 0 or new.round == settings.rounds
    ):
        with timed("evaluate"):
            scores = run.evaluate(new, adapter)
    updates = received.updates
    senders = updates if received.senders is None else received.senders
    run.privacy.add(senders)
    privacy = run.privacy.summary()
    event: Event = {
        "event": "round",
        "round": new.round,
        "train_loss": _train_loss(updates),
        # JSON has no NaN or infinity, and a diverged model must not end the run
        "eval": {key: value for key, value in scores.items() if math.isfinite(value)},
        "clients": [sender.client for sender in senders],
        "missing": list(received.missing),
        "rejected": len(received.rejected),
        "bytes_up": received.bytes_up,
        "bytes_down": received.bytes_down,
        "aggregation_error": error if error is not None and math.isfinite(error) else None,
        "epsilon": privacy["epsilon"] if privacy else None,
        "seconds": {stage: round(s, 6) for stage, s in timed.seconds.items()},
        "adapter_sha256": tensors_digest(adapter.tensors),
        **received.event,
    }
    if privacy:
        event["privacy"] = privacy
    if notes:
        event["notes"] = notes
    if not settings.compression.plain:
        event["compression"] = asdict(settings.compression)
    events = [*received.rejected, event]
    record = {
        "run": run.run,
        "attempt": received.attempt,
        "extra": dict(new.extra),
        "client_metrics": {sender.client: dict(sender.metrics) for sender in senders},
        "weights": {sender.client: sender.weight for sender in senders},
        "privacy": run.privacy.to_json(),
        "events": events,
        **received.record,
    }
    with shielded():
        run.store.commit(new.round, new.tensors, record)
        for line in events:
            run.emit(line)
        run.store.prune(new.round, settings.keep_rounds, settings.keep_every)
    return new


def _error(
    run: RunParts, state: StrategyState, received: Received, adapter: AdapterState
) -> float | None:
    if run.strategy.personal or not received.comparable:
        return None
    total = sum(update.weight for update in received.updates)
    clients = [
        Trained(update.weight / total, update.delta.spec, _reader(run, update))
        for update in received.updates
    ]
    return aggregation_error(
        run.method, run.basis, clients, adapter, lambda layer: folded(state.tensors, layer)
    )


def _reader(run: RunParts, update: ClientUpdate) -> Callable[[LayerSpec], Mapping[str, Tensor]]:
    ended = update.ended

    def read(layer: LayerSpec) -> Mapping[str, Tensor]:
        return {f: ended[f"{layer.name}.{f}"] for f in run.method.factor_shapes(layer)}

    return read


def _train_loss(updates: Sequence[ClientUpdate]) -> float | None:
    losses = [
        (update.metrics["train_loss"], update.weight)
        for update in updates
        if "train_loss" in update.metrics
    ]
    weight = sum(w for _, w in losses)
    if not weight:
        return None
    mean = sum(loss * (w / weight) for loss, w in losses)
    return mean if math.isfinite(mean) else None
