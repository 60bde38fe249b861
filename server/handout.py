"""Handout: one version of the global adapter given to clients, and what came back of it."""

from collections.abc import Hashable, Sequence
from dataclasses import replace

import torch

from fedlora.adapter import AdapterState, split_name
from fedlora.adapters.base import Basis
from fedlora.errors import StrategyError, UpdateRejected, shown
from fedlora.messages import (
    CONTROL,
    Broadcast,
    ClientUpdate,
    LazyTensors,
    RoundPlan,
    Start,
    part_coding,
)
from fedlora.server.admission import Expectation, admit, expected_size
from fedlora.server.guard import Step, expect_type, strategy_errors
from fedlora.server.journal import Event
from fedlora.server.link import Reply, Task
from fedlora.server.run_parts import RunParts
from fedlora.server.soundness import checked_shapes, checked_start
from fedlora.server.spool import Spool
from fedlora.strategies.base import ClientInfo, StrategyState
from fedlora.strategies.plan_check import plan_problem
from fedlora.wire import Shapes, encode_broadcast, encode_coded, encode_tensors, sha256


class Handout:
    """The work of one round's clients, or of those that started from one version.

    Args:
        run: the run.
        state: the version that is handed out.
        attempt: number of the attempt at the round.
        spool: where admitted updates are kept.

    Attributes:
        expected: what each client asked must send.
        updates: what was admitted, by client; the tensors are in the spool.
        rejected: events of what was not.
        bytes_up, bytes_down: of all replies so far.
    """

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

    def tasks(self, chosen: Sequence[ClientInfo]) -> tuple[list[Task], dict[str, bytes]]:
        """A task for each of these clients, and the parts they name, by digest.

        Raises:
            StrategyError: the strategy cannot make them.
        """
        with strategy_errors(self.run.strategy, self.state, "broadcast_key") as step:
            return self._tasks(chosen, step)

    def _tasks(
        self, chosen: Sequence[ClientInfo], step: Step
    ) -> tuple[list[Task], dict[str, bytes]]:
        strategy, state = self.run.strategy, self.state
        parts: dict[str, bytes] = {}
        made: dict[Hashable, tuple[Start, dict[str, str], str]] = {}
        interned: dict[Hashable, Shapes] = {}
        tasks = []
        for client in chosen:
            step.name = "broadcast_key"
            key = strategy.broadcast_key(state, client)
            if key not in made:
                step.name = "broadcast"
                start = checked_start(state, strategy.broadcast(state, client))
                digests = {}
                for name, tensors in split_parts(start, self.run.sent_basis).items():
                    coding = part_coding(name, self.run.settings.compression.down)
                    data = encode_coded(tensors, coding)
                    digests[name] = sha256(data)
                    parts[digests[name]] = data
                made[key] = (start, digests, start.adapter.spec.digest())
            start, digests, spec_digest = made[key]
            adapter = start.adapter
            step.name = "plan"
            plan = self._plan(client)
            fold_ranks = {
                f"fold.{version}": tuple(
                    tensors[f"{layer.name}.L"].shape[1] for layer in adapter.spec.layers
                )
                for version, tensors in start.fold.items()
            }
            broadcast = Broadcast(plan, spec_digest, digests, fold_ranks)
            step.name = "expect"
            shapes: Shapes = checked_shapes(strategy.expect(state, plan), plan, start)
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
                size_bytes=expected_size(shapes, plan.coding),
                slots=plan.slots,
                factors=plan.sent,
                coding=plan.coding,
                entry=self.run.privacy.entry(client.name),
            )
            most = self.expected[client.name].size_bytes
            tasks.append(Task(client.name, encode_broadcast(broadcast), most))
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
            up=settings.compression.up.scheme,
            top_k=settings.compression.up.top_k,
            down=settings.compression.down.scheme,
            feedback=self._feedback(),
        )
        asked = self.run.strategy.plan(self.state, client, blank)
        expect_type(asked, RoundPlan, f"what plan returned for client {client.name}")
        plan = replace(
            asked,
            run=blank.run,
            round=blank.round,
            attempt=blank.attempt,
            client=blank.client,
            up=blank.up,
            top_k=blank.top_k,
            down=blank.down,
            feedback=blank.feedback,
        )
        if why := plan_problem(plan, self.state.spec, self.run.method):
            raise StrategyError(f"the plan for client {client.name} {why}")
        most = self.state.spec.rank if self.run.strategy.budgets else client.rank
        if not 1 <= plan.rank <= most:
            raise StrategyError(
                f"the plan gives client {client.name} rank {plan.rank}; expected 1 to {most}"
            )
        return plan

    def _feedback(self) -> bool:
        """Whether clients keep what coding takes from their updates."""
        compression = self.run.settings.compression
        # what was left of old factors means nothing in new ones
        return compression.feedback and not compression.up.plain and not self.run.strategy.regauges

    def admit(self, reply: Reply) -> bool:
        """Takes a reply in, or notes why not; says whether there is one more update."""
        self.bytes_down += reply.bytes_down
        self.bytes_up += len(reply.manifest) + len(reply.payload)
        try:
            if reply.client not in self.expected:
                raise UpdateRejected(reply.client, "CLIENT", "was not asked in this round")
            if reply.error:
                raise UpdateRejected(reply.client, reply.code, reply.error)
            if not reply.manifest:
                return False
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
                    # part of it may be the client's own words
                    "detail": shown(e.detail),
                }
            )
            return False
        # a packed or coded reply is kept at full rank in float32, so that all are read alike
        dense = reply.payload
        if update.slots is not None or not self.expected[reply.client].coding.plain:
            control = {CONTROL + name: tensor for name, tensor in update.control.items()}
            dense = encode_tensors({**update.delta.tensors, **control})
        self.spool.add(reply.client, dense)
        # the tensors now live in the spool; only the small fields stay in memory
        empty = AdapterState(update.delta.spec, {})
        self.updates[reply.client] = replace(update, delta=empty, control={})
        return True

    def reject(self, why: UpdateRejected) -> None:
        """Notes that a client's part in the round was refused."""
        self.rejected.append(
            {
                "event": "rejected",
                "round": self.round,
                "client": why.client,
                "code": why.code,
                "detail": why.detail,
            }
        )

    def read(self, client: str) -> ClientUpdate:
        """The admitted update of a client; its tensors are read when they are asked for."""
        update = self.updates[client]
        read = self.spool.tensors(client, self.expected[client].shapes)
        changed = [key for key in read if not key.startswith(CONTROL)]
        control = [key.removeprefix(CONTROL) for key in read if key.startswith(CONTROL)]
        delta = AdapterState(update.delta.spec, LazyTensors(changed, read.__getitem__))
        return replace(
            update, delta=delta, control=LazyTensors(control, lambda key: read[CONTROL + key])
        )


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
