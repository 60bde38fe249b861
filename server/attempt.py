"""One attempt at one round, from choosing clients to the committed state."""

import math
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from fedlora.adapter import (
    AdapterState,
    LayerSpec,
    split_name,
    tensors_digest,
    trained_shapes,
)
from fedlora.adapters.base import Basis, Method
from fedlora.checkpoint import RunStore
from fedlora.errors import FedloraError, StrategyError, UpdateRejected
from fedlora.messages import Broadcast, ClientUpdate, OptimizerState, RoundPlan
from fedlora.seeds import generator
from fedlora.server.admission import Expectation, Limits, admit, expected_size
from fedlora.server.aggregation_error import Trained, aggregation_error
from fedlora.server.interrupt import shielded
from fedlora.server.link import Link, Reply, Task
from fedlora.server.spool import Spool
from fedlora.strategies.base import ClientInfo, Strategy, StrategyState
from fedlora.wire import Shapes, encode_broadcast, encode_tensors, sha256

Event = dict[str, Any]
Evaluate = Callable[[AdapterState], Mapping[str, float]]


@dataclass(frozen=True)
class RoundSettings:
    """What the job says about rounds.

    Attributes:
        rounds: rounds of the whole run.
        clients_per_round: None takes everybody.
        quorum: fewest admitted updates; None is two thirds of those chosen, rounded up.
        deadline_s: seconds after which a round closes.
        retries: further attempts of a round below quorum.
        local_steps: optimiser steps per client.
        evaluate_every: rounds between evaluations.
        keep_rounds, keep_every: which old rounds keep their tensors.
    """

    seed: int
    rounds: int
    clients_per_round: int | None
    quorum: int | None
    deadline_s: float
    retries: int
    local_steps: int
    optimizer_state: OptimizerState
    evaluate_every: int
    keep_rounds: int
    keep_every: int
    limits: Limits


@dataclass(frozen=True)
class RunParts:
    """What every attempt of a run works with.

    Attributes:
        run: lineage id of the run.
        store: where rounds are committed.
        link: the clients.
        strategy: how updates are merged.
        method, basis: of the adapter.
        sent_basis: the basis again if clients cannot make it themselves; each gets it once.
        evaluate: measures a global adapter; None where the server has no data.
        emit: receives every event of the run.
    """

    run: str
    store: RunStore
    link: Link
    strategy: Strategy
    method: Method
    basis: Basis
    sent_basis: Basis
    settings: RoundSettings
    evaluate: Evaluate | None
    emit: Callable[[Event], None]


class Attempt:
    """One attempt at one round: `collect`, then `merge`, then `commit`."""

    def __init__(self, run: RunParts, state: StrategyState, attempt: int, spool: Spool) -> None:
        self.run = run
        self.state = state
        self.round = state.round + 1
        self.attempt = attempt
        self.spool = spool
        self.expected: dict[str, Expectation] = {}
        self.updates: dict[str, ClientUpdate] = {}
        self.rejected: list[Event] = []
        self.bytes_up = self.bytes_down = 0
        self.seconds: dict[str, float] = {}

    def collect(self) -> str:
        """Hands out work and admits what comes back; says what is missing for a quorum."""
        settings = self.run.settings
        with self._timed("broadcast"):
            chosen = self._choose()
            with self._strategy_errors("broadcast"):
                tasks, parts = self._tasks(chosen)
        with self._timed("clients"):
            for reply in self.run.link.exchange(tasks, parts, settings.deadline_s):
                self._admit(reply)
        quorum = settings.quorum or math.ceil(2 * len(chosen) / 3)
        if len(self.updates) >= max(1, quorum):
            return ""
        why = ""
        if self.rejected:
            first = self.rejected[0]
            why = f", {len(self.rejected)} rejected ({first['client']}: {first['detail'][:200]})"
        return (
            f"{len(self.updates)} of {len(chosen)} clients gave a usable update{why}; "
            f"the quorum is {quorum}"
        )

    def merge(self) -> StrategyState:
        """reduce, then refactor; the result is checked before anybody sees it."""
        strategy = self.run.strategy
        with self._timed("reduce"), self._strategy_errors("reduce"):
            stats = strategy.reduce(self.state, self._stream)
        with self._timed("refactor"), self._strategy_errors("refactor"):
            new = strategy.refactor(self.state, stats)
            if new.round != self.round:
                raise StrategyError(f"refactor returned round {new.round}; expected {self.round}")
            for name, tensor in new.tensors.items():
                if not bool(torch.isfinite(tensor).all()):
                    raise StrategyError(f"tensor {name} is not finite after refactor")
            adapter = strategy.global_delta(new)
            for name, shape in trained_shapes(adapter.spec, self.run.method).items():
                if name not in adapter.tensors:
                    raise StrategyError(f"the adapter lacks {name} after refactor")
                tensor = adapter.tensors[name]
                if tuple(tensor.shape) != shape or tensor.dtype != torch.float32:
                    raise StrategyError(
                        f"tensor {name} has shape {tuple(tensor.shape)} and dtype {tensor.dtype} "
                        f"after refactor; expected {shape} and torch.float32"
                    )
        return new

    def commit(self, new: StrategyState) -> StrategyState:
        """Measures, commits and reports the round."""
        run, settings = self.run, self.run.settings
        adapter = run.strategy.global_delta(new)
        with self._timed("aggregation_error"):
            error = self._aggregation_error(adapter)
        scores: Mapping[str, float] = {}
        due = self.round % settings.evaluate_every == 0 or self.round == settings.rounds
        if run.evaluate is not None and due:
            with self._timed("evaluate"):
                scores = run.evaluate(adapter)
        event: Event = {
            "event": "round",
            "round": self.round,
            "train_loss": self._train_loss(),
            # JSON has no NaN or infinity, and a diverged model must not end the run
            "eval": {key: value for key, value in scores.items() if math.isfinite(value)},
            "clients": sorted(self.updates),
            "missing": sorted(
                self.expected.keys() - self.updates.keys() - {e["client"] for e in self.rejected}
            ),
            "rejected": len(self.rejected),
            "bytes_up": self.bytes_up,
            "bytes_down": self.bytes_down,
            "aggregation_error": error if error is not None and math.isfinite(error) else None,
            "epsilon": None,
            "seconds": {stage: round(s, 6) for stage, s in self.seconds.items()},
            "adapter_sha256": tensors_digest(adapter.tensors),
        }
        events = [*self.rejected, event]
        record = {
            "run": run.run,
            "attempt": self.attempt,
            "extra": dict(new.extra),
            "client_metrics": {name: dict(u.metrics) for name, u in sorted(self.updates.items())},
            "weights": {name: u.weight for name, u in sorted(self.updates.items())},
            "events": events,
        }
        with shielded():
            run.store.commit(self.round, new.tensors, record)
            for line in events:
                run.emit(line)
            run.store.prune(self.round, settings.keep_rounds, settings.keep_every)
        return new

    def _choose(self) -> list[ClientInfo]:
        settings = self.run.settings
        roster = list(self.run.link.roster())
        wanted = settings.clients_per_round or len(roster)
        if wanted >= len(roster):
            return roster
        stream = generator(settings.seed, "clients", self.round, self.attempt)
        picks = torch.randperm(len(roster), generator=stream)[:wanted].tolist()
        return [roster[i] for i in sorted(picks)]

    def _tasks(self, chosen: Sequence[ClientInfo]) -> tuple[list[Task], dict[str, bytes]]:
        strategy, state = self.run.strategy, self.state
        parts: dict[str, bytes] = {}
        made: dict[Hashable, tuple[AdapterState, dict[str, str], str]] = {}
        interned: dict[Hashable, Shapes] = {}
        tasks = []
        for client in chosen:
            key = strategy.broadcast_key(state, client)
            if key not in made:
                adapter = strategy.broadcast(state, client)
                digests = {}
                for name, tensors in split_parts(adapter, self.run.sent_basis).items():
                    data = encode_tensors(tensors)
                    digests[name] = sha256(data)
                    parts[digests[name]] = data
                made[key] = (adapter, digests, adapter.spec.digest())
            adapter, digests, spec_digest = made[key]
            plan = RoundPlan(
                run=self.run.run,
                round=self.round,
                attempt=self.attempt,
                client=client.name,
                factors=strategy.factors(state),
                rank=client.rank,
                local_steps=self.run.settings.local_steps,
                optimizer_state=self.run.settings.optimizer_state,
            )
            broadcast = Broadcast(plan, spec_digest, digests)
            shapes: Shapes = strategy.expect(state, client)
            # clients with equal shapes share one object, so that each costs little memory
            shapes = interned.setdefault(tuple(shapes.items()), shapes)
            self.expected[client.name] = Expectation(
                run=self.run.run,
                round=self.round,
                attempt=self.attempt,
                client=client.name,
                start=adapter,
                start_sha256=broadcast.start_sha256,
                spec=adapter.spec,
                spec_digest=spec_digest,
                shapes=shapes,
                size_bytes=expected_size(shapes),
            )
            tasks.append(Task(client.name, encode_broadcast(broadcast)))
        return tasks, parts

    def _admit(self, reply: Reply) -> None:
        self.bytes_down += reply.bytes_down
        self.bytes_up += len(reply.manifest) + len(reply.payload)
        try:
            if reply.client not in self.expected:
                raise UpdateRejected(reply.client, "CLIENT", "was not asked in this round")
            if reply.error:
                raise UpdateRejected(reply.client, "CLIENT_ERROR", reply.error)
            if not reply.manifest:
                return
            if reply.client in self.updates:
                raise UpdateRejected(reply.client, "STALE", "a second reply in one round")
            limits = self.run.settings.limits
            update = admit(reply.manifest, reply.payload, self.expected[reply.client], limits)
        except UpdateRejected as e:
            self.rejected.append(
                {
                    "event": "rejected",
                    "round": self.round,
                    "client": e.client,
                    "code": e.code,
                    "detail": e.detail,
                }
            )
            return
        self.spool.add(reply.client, reply.payload)
        # the tensors now live in the spool; only the small fields stay in memory
        self.updates[reply.client] = replace(update, delta=AdapterState(update.delta.spec, {}))

    def _stream(self) -> Iterator[ClientUpdate]:
        for name in self.spool.clients():
            update, shapes = self.updates[name], self.expected[name].shapes
            tensors = self.spool.read(name, shapes)
            yield replace(update, delta=AdapterState(update.delta.spec, tensors))

    def _aggregation_error(self, adapter: AdapterState) -> float | None:
        total = sum(update.weight for update in self.updates.values())
        clients = [
            Trained(update.weight / total, update.delta.spec, self._reader(name))
            for name, update in sorted(self.updates.items())
        ]
        spec = self.state.spec
        return aggregation_error(self.run.method, spec, self.run.basis, clients, adapter.tensors)

    def _reader(self, client: str) -> Callable[[LayerSpec], Mapping[str, torch.Tensor]]:
        expected = self.expected[client]

        def read(layer: LayerSpec) -> Mapping[str, torch.Tensor]:
            names = {f"{layer.name}.{f}": f for f in self.run.method.factor_shapes(layer)}
            deltas = self.spool.read_some(client, expected.shapes, names)
            trained = {}
            for name, factor in names.items():
                start = expected.start.tensors[name].double()
                trained[factor] = start + deltas[name].double() if name in deltas else start
            return trained

        return read

    def _train_loss(self) -> float | None:
        losses = [
            (u.metrics["train_loss"], u.weight)
            for _, u in sorted(self.updates.items())
            if "train_loss" in u.metrics
        ]
        weight = sum(w for _, w in losses)
        if not weight:
            return None
        mean = sum(loss * (w / weight) for loss, w in losses)
        return mean if math.isfinite(mean) else None

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - started

    @contextmanager
    def _strategy_errors(self, step: str) -> Iterator[None]:
        try:
            yield
        except FedloraError as e:
            if isinstance(e, StrategyError):
                raise StrategyError(
                    f"strategy {self.run.strategy.name!r}, round {self.round}: {e}; the run "
                    f"stands at round {self.round - 1}"
                ) from e
            raise
        except Exception as e:  # a plug-in may fail in any way it likes
            raise StrategyError(
                f"strategy {self.run.strategy.name!r} failed in {step} of round {self.round}: "
                f"{type(e).__name__}: {e}; the run stands at round {self.round - 1}"
            ) from e


def split_parts(adapter: AdapterState, basis: Basis) -> dict[str, dict[str, torch.Tensor]]:
    """The parts of a broadcast: one per factor, one for the heads, one for the basis."""
    layers = {layer.name for layer in adapter.spec.layers}
    parts: dict[str, dict[str, torch.Tensor]] = {"basis": dict(basis)} if basis else {}
    for name, tensor in adapter.tensors.items():
        layer, factor = split_name(name)
        part = f"factor.{factor}" if layer in layers else "heads"
        parts.setdefault(part, {})[name] = tensor
    return parts
