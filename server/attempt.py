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
from fedlora.adapters import METHODS
from fedlora.adapters.base import Basis, Method
from fedlora.checkpoint import RunStore
from fedlora.errors import FedloraError, StrategyError, UpdateRejected
from fedlora.messages import (
    CONTROL,
    Broadcast,
    ClientUpdate,
    LazyTensors,
    OptimizerState,
    RoundPlan,
    Start,
)
from fedlora.seeds import generator
from fedlora.server.admission import Expectation, Limits, admit, expected_size
from fedlora.server.aggregation_error import Trained, aggregation_error
from fedlora.server.interrupt import shielded
from fedlora.server.link import Link, Reply, Task
from fedlora.server.spool import Spool
from fedlora.strategies.base import ClientInfo, Strategy, StrategyState
from fedlora.strategies.fold import folded
from fedlora.wire import Shapes, encode_broadcast, encode_json, encode_tensors, sha256

Event = dict[str, Any]
Evaluate = Callable[[StrategyState, AdapterState], Mapping[str, float]]


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
        evaluate: measures a state and its global adapter; None where the server has no data.
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
        self.notes: Mapping[str, Any] = {}

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

    def merge(self) -> tuple[StrategyState, AdapterState]:
        """reduce, then refactor: the next state and its global adapter.

        Both are checked before anybody sees them.
        """
        strategy = self.run.strategy
        with self._timed("reduce"), self._strategy_errors("reduce"):
            stats = strategy.reduce(self.state, self._updates())
            self.notes = dict(stats.notes)
            encode_json(self.notes)
        with self._timed("refactor"), self._strategy_errors("refactor"):
            new = strategy.refactor(self.state, stats)
            if new.round != self.round:
                raise StrategyError(f"refactor returned round {new.round}; expected {self.round}")
            for name, tensor in new.tensors.items():
                if not bool(torch.isfinite(tensor).all()):
                    raise StrategyError(f"tensor {name} is not finite after refactor")
            adapter = strategy.global_delta(new)
            for name, shape in trained_shapes(adapter.spec, METHODS[adapter.spec.method]).items():
                if name not in adapter.tensors:
                    raise StrategyError(f"the adapter lacks {name} after refactor")
                tensor = adapter.tensors[name]
                if tuple(tensor.shape) != shape or tensor.dtype != torch.float32:
                    raise StrategyError(
                        f"tensor {name} has shape {tuple(tensor.shape)} and dtype {tensor.dtype} "
                        f"after refactor; expected {shape} and torch.float32"
                    )
        return new, adapter

    def commit(self, new: StrategyState, adapter: AdapterState) -> StrategyState:
        """Measures, commits and reports the round."""
        run, settings = self.run, self.run.settings
        with self._timed("aggregation_error"):
            error = self._aggregation_error(adapter)
        scores: Mapping[str, float] = {}
        due = self.round % settings.evaluate_every == 0 or self.round == settings.rounds
        if run.evaluate is not None and due:
            with self._timed("evaluate"):
                scores = run.evaluate(new, adapter)
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
        if self.notes:
            event["notes"] = self.notes
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
        made: dict[Hashable, tuple[Start, dict[str, str], str]] = {}
        interned: dict[Hashable, Shapes] = {}
        tasks = []
        for client in chosen:
            key = strategy.broadcast_key(state, client)
            if key not in made:
                start = strategy.broadcast(state, client)
                digests = {}
                for name, tensors in split_parts(start, self.run.sent_basis).items():
                    data = encode_tensors(tensors)
                    digests[name] = sha256(data)
                    parts[digests[name]] = data
                made[key] = (start, digests, start.adapter.spec.digest())
            start, digests, spec_digest = made[key]
            adapter = start.adapter
            plan = self._plan(client)
            fold_ranks = {
                f"fold.{version}": tuple(
                    tensors[f"{layer.name}.L"].shape[1] for layer in adapter.spec.layers
                )
                for version, tensors in start.fold.items()
            }
            broadcast = Broadcast(plan, spec_digest, digests, fold_ranks)
            shapes: Shapes = strategy.expect(state, plan)
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
                slots=plan.slots,
                factors=plan.sent,
            )
            tasks.append(Task(client.name, encode_broadcast(broadcast)))
        return tasks, parts

    def _plan(self, client: ClientInfo) -> RoundPlan:
        """The strategy's plan for a client, with what is not the strategy's to choose."""
        settings = self.run.settings
        blank = RoundPlan(
            run=self.run.run,
            round=self.round,
            attempt=self.attempt,
            client=client.name,
            factors=(),
            rank=client.rank,
            local_steps=settings.local_steps,
            optimizer_state=settings.optimizer_state,
        )
        plan = replace(
            self.run.strategy.plan(self.state, client, blank),
            run=blank.run,
            round=blank.round,
            attempt=blank.attempt,
            client=blank.client,
        )
        known = self.run.method.factor_shapes(self.state.spec.layers[0])
        if odd := [factor for factor in plan.factors if factor not in known]:
            raise StrategyError(
                f"the plan trains factor {odd[0]!r}; method {self.run.method.name!r} has "
                f"{', '.join(known)}"
            )
        if not 1 <= plan.rank <= client.rank:
            raise StrategyError(
                f"the plan gives client {client.name} rank {plan.rank}; expected 1 to {client.rank}"
            )
        return plan

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
        # a packed reply is kept at full rank, so that all are read alike
        dense = reply.payload if update.slots is None else encode_tensors(update.delta.tensors)
        self.spool.add(reply.client, dense)
        # the tensors now live in the spool; only the small fields stay in memory
        empty = AdapterState(update.delta.spec, {})
        self.updates[reply.client] = replace(update, delta=empty, control={})

    def _updates(self) -> list[ClientUpdate]:
        """The admitted updates by client name; their tensors are read when asked for."""
        found = []
        for name in self.spool.clients():
            update = self.updates[name]
            read = self.spool.tensors(name, self.expected[name].shapes)
            changed = [key for key in read if not key.startswith(CONTROL)]
            control = [key.removeprefix(CONTROL) for key in read if key.startswith(CONTROL)]
            delta = AdapterState(update.delta.spec, LazyTensors(changed, read.__getitem__))
            found.append(
                replace(
                    update,
                    delta=delta,
                    control=LazyTensors(control, lambda key, read=read: read[CONTROL + key]),  # type: ignore[misc]
                )
            )
        return found

    def _aggregation_error(self, adapter: AdapterState) -> float | None:
        if self.run.strategy.personal:
            return None
        updates = self._updates()
        total = sum(update.weight for update in updates)
        clients = [
            Trained(update.weight / total, update.delta.spec, self._reader(update))
            for update in updates
        ]
        return aggregation_error(
            self.run.method,
            self.run.basis,
            clients,
            adapter,
            lambda layer: folded(self.state.tensors, layer),
        )

    def _reader(self, update: ClientUpdate) -> Callable[[LayerSpec], Mapping[str, torch.Tensor]]:
        ended = update.ended

        def read(layer: LayerSpec) -> Mapping[str, torch.Tensor]:
            return {f: ended[f"{layer.name}.{f}"] for f in self.run.method.factor_shapes(layer)}

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
        # torch counts every change of a tensor in place
        before = {name: (id(t), t._version) for name, t in self.state.tensors.items()}
        try:
            yield
            after = {name: (id(t), t._version) for name, t in self.state.tensors.items()}
            if changed := sorted({k for k, _ in before.items() ^ after.items()}):
                raise StrategyError(
                    f"{step} changed tensor {changed[0]} of the state it was given; a strategy "
                    "must return new tensors"
                )
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


def split_parts(start: Start, basis: Basis) -> dict[str, dict[str, torch.Tensor]]:
    """The parts of a broadcast: one per factor, for the heads, the basis, each fold, and c."""
    adapter = start.adapter
    layers = {layer.name for layer in adapter.spec.layers}
    parts: dict[str, dict[str, torch.Tensor]] = {"basis": dict(basis)} if basis else {}
    for version, fold in start.fold.items():
        parts[f"fold.{version}"] = dict(fold)
    if start.control:
        parts["control"] = dict(start.control)
    for name, tensor in adapter.tensors.items():
        layer, factor = split_name(name)
        part = f"factor.{factor}" if layer in layers else "heads"
        parts.setdefault(part, {})[name] = tensor
    return parts
