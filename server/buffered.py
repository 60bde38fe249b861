"""Buffered asynchronous rounds: the server merges whenever enough updates have come.

Nguyen et al., "Federated Learning with Buffered Asynchronous Aggregation",
https://arxiv.org/abs/2106.06639, algorithm 1. With K updates in the buffer, each trained on
its own version v_i of the adapter,

    theta <- theta + rate * sum_i w_i u_i / K,        w_i = (1 + v - v_i)^(-1/2)

u_i is the change of the factors where the merge is a mean of factors, and the change of the
product s B A where the strategy makes the factors anew between versions (their factors are
not comparable). The sum is divided by K and not by sum w_i, which would undo the damping.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fedlora.adapter import AdapterState, LayerSpec, split_name
from fedlora.checkpoint import Committed
from fedlora.errors import QuorumFailed
from fedlora.linalg import stack
from fedlora.messages import ClientUpdate, LazyTensors, Pair
from fedlora.seeds import generator
from fedlora.server.handout import Handout
from fedlora.server.journal import Event
from fedlora.server.link import AsyncLink
from fedlora.server.merge import Received, Stopwatch, merge
from fedlora.server.run_parts import RunParts
from fedlora.server.soundness import global_adapter
from fedlora.server.spool import Spool
from fedlora.strategies.base import ClientInfo, Strategy, StrategyState


@dataclass(frozen=True)
class BufferSettings:
    """What the job says about asynchronous rounds.

    Attributes:
        size: updates per merge, K.
        concurrency: clients at work at the same time; None for all.
        max_staleness: an update of an older version is rejected.
        rate: the server's learning rate.
    """

    size: int
    concurrency: int | None
    max_staleness: int
    rate: float = 1.0


@dataclass(frozen=True)
class Flight:
    """A client at work: the version it started from, at which attempt, and when it is due."""

    client: str
    version: int
    attempt: int
    due: float


class BufferedRounds:
    """The asynchronous loop of one run; each merge is a round.

    Args:
        run: the run.
        link: its clients.
        settings: what the job says.
        load: version -> the strategy's state in it, for clients at work across a resume.
    """

    def __init__(
        self,
        run: RunParts,
        link: AsyncLink,
        settings: BufferSettings,
        load: Callable[[int], StrategyState],
    ) -> None:
        self.run = run
        self.link = link
        self.settings = settings
        self.load = load
        self._handouts: dict[int, Handout] = {}
        self._flights: dict[str, Flight] = {}
        # (version, client) of the updates in the buffer
        self._buffer: list[tuple[int, str]] = []
        self._rejected: list[Event] = []
        self._bytes = [0, 0]
        self._asked: set[str] = set()
        self._attempt = 0

    def go(self, state: StrategyState, committed: Committed, until: int | None) -> StrategyState:
        """Runs up to version `until` (by default all rounds) and returns the last state.

        Raises:
            QuorumFailed: no client is left that could fill the buffer.
            StrategyError, StorageError: see `run_rounds`.
        """
        rounds = self.run.settings.rounds
        last = rounds if until is None else min(until, rounds)
        try:
            self._open(state)
            self._return_to_work(committed.record.get("in_flight", []), state.round)
            self.link.set_clock(float(committed.record.get("clock", 0.0)))
            while state.round < last:
                state = self._one_round(state)
        finally:
            for handout in self._handouts.values():
                handout.spool.close()
        return state

    def _one_round(self, state: StrategyState) -> StrategyState:
        timed = Stopwatch()
        while len(self._buffer) < self.settings.size:
            with timed("broadcast"):
                self._fill(state)
            if not self._flights:
                self._again(state)
                continue
            with timed("clients"):
                self._take()
        # before the commit, so that a resume finds the same clients at work
        self._dismiss(state.round + 1)
        new = merge(self.run, state, self._received(state), timed)
        self._forget(new.round)
        self._open(new)
        return new

    def _dismiss(self, version: int) -> None:
        """Waits no longer for clients whose update would be too old for this merge's result."""
        for name, flight in sorted(self._flights.items()):
            staleness = version - flight.version
            if staleness > self.settings.max_staleness:
                self.link.cancel(name)
                del self._flights[name]
                self._rejected.append(
                    {
                        "event": "rejected",
                        "round": version,
                        "client": name,
                        "code": "STALE",
                        "detail": f"still at work on version {flight.version}, {staleness} "
                        f"versions ago; federation.max_staleness is "
                        f"{self.settings.max_staleness}",
                    }
                )

    def _open(self, state: StrategyState) -> None:
        """Makes a version ready to be handed out."""
        version = state.round
        if version not in self._handouts:
            spool = Spool(self.run.store.folder / f"spool-{version:04d}.bin")
            self._handouts[version] = Handout(self.run, state, self._attempt, spool)

    def _forget(self, version: int) -> None:
        """Empties the buffer and drops versions that nobody works on any more."""
        self._buffer, self._rejected, self._bytes = [], [], [0, 0]
        self._asked, self._attempt = set(), 0
        at_work = {flight.version for flight in self._flights.values()}
        for old in [v for v in self._handouts if v < version and v not in at_work]:
            self._handouts.pop(old).spool.close()

    def _fill(self, state: StrategyState) -> None:
        """Gives the present version to idle clients that have not had it."""
        roster = {client.name: client for client in self.link.roster()}
        wanted = min(self.settings.concurrency or len(roster), len(roster)) - len(self._flights)
        idle = sorted(roster.keys() - self._flights.keys() - self._asked)
        if wanted <= 0 or not idle:
            return
        # a stream per state of affairs, so that a resume draws alike
        stream = generator(
            self.run.settings.seed, "clients", state.round + 1, self._attempt, len(self._asked)
        )
        picks = torch.randperm(len(idle), generator=stream)[:wanted].tolist()
        self._hand_out(state.round, [roster[idle[i]] for i in sorted(picks)])

    def _hand_out(
        self, version: int, clients: list[ClientInfo], due: Mapping[str, float] | None = None
    ) -> None:
        handout = self._handouts[version]
        tasks, parts = handout.tasks(clients)
        for task in tasks:
            when = self.link.submit(
                task, parts, self.run.settings.deadline_s, (due or {}).get(task.client)
            )
            self._flights[task.client] = Flight(task.client, version, handout.attempt, when)
            self._asked.add(task.client)

    def _return_to_work(self, flights: list[Mapping[str, Any]], present: int) -> None:
        """Hands the work of an interrupted run out again, with the times it was due."""
        roster = {client.name: client for client in self.link.roster()}
        for flight in flights:
            version, client = int(flight["version"]), str(flight["client"])
            if client in roster:
                self._open(self.load(version))
                self._handouts[version].attempt = int(flight["attempt"])
                self._hand_out(version, [roster[client]], {client: float(flight["due"])})
        # those at work on older versions may still be given the present one
        self._asked -= {f.client for f in self._flights.values() if f.version != present}

    def _take(self) -> None:
        reply = self.link.next_reply()
        flight = self._flights.pop(reply.client)
        handout = self._handouts[flight.version]
        before = len(handout.rejected)
        self._bytes[0] += len(reply.manifest) + len(reply.payload)
        self._bytes[1] += reply.bytes_down
        if handout.admit(reply):
            self._buffer.append((flight.version, reply.client))
        self._rejected += handout.rejected[before:]

    def _again(self, state: StrategyState) -> None:
        """Everybody has had this version and the buffer is not full: ask again, or give up."""
        number, have = state.round + 1, len(self._buffer)
        why = f"{have} of {self.settings.size} updates in the buffer and no client at work"
        # whoever has contributed to this merge has nothing new to say
        asked = {client for version, client in self._buffer if version == state.round}
        left = {client.name for client in self.link.roster()} - asked
        for line in self._rejected:
            self.run.emit(line)
        self._rejected = []
        if self._attempt >= self.run.settings.retries or not left:
            raise QuorumFailed(
                f"round {number} failed after {self._attempt + 1} attempts: {why}; the run stands "
                f"at round {state.round}. Bring clients back, then: fedlora resume "
                f"{self.run.store.folder}"
            )
        self.run.emit({"event": "abandoned", "round": number, "attempt": self._attempt, "why": why})
        self._attempt += 1
        self._handouts[state.round].attempt = self._attempt
        self._asked = asked

    def _received(self, state: StrategyState) -> Received:
        present = global_adapter(self.run.strategy, state)
        updates = []
        for version, client in sorted(self._buffer, key=lambda entry: (entry[1], entry[0])):
            weight = self.settings.rate * (1 + state.round - version) ** -0.5
            update = self._handouts[version].read(client)
            updates.append(rebased(self.run.strategy, present, update, weight))
        flights = [vars(self._flights[name]) for name in sorted(self._flights)]
        return Received(
            updates=updates,
            rejected=self._rejected,
            missing=[],
            bytes_up=self._bytes[0],
            bytes_down=self._bytes[1],
            attempt=self._attempt,
            event={
                "staleness": [
                    [client, state.round - version] for version, client in sorted(self._buffer)
                ],
                "clock_s": round(self.link.clock(), 6),
            },
            record={"in_flight": flights, "clock": self.link.clock()},
            comparable=False,
        )


def rebased(
    strategy: Strategy, present: AdapterState, update: ClientUpdate, weight: float
) -> ClientUpdate:
    """`update` as if it had started from the present adapter, its change times `weight`.

    All rebased updates count alike, so that their mean is theta + sum_i w_i u_i / K.

    Args:
        present: the present adapter, at the global rank.
        update: trained on this or an earlier version.
        weight: rate times staleness weight.
    """
    spec = present.spec
    start, small = update.begin, {layer.name: layer for layer in update.delta.spec.layers}
    whole = {layer.name: layer for layer in spec.layers}
    delta = update.delta.tensors

    def change(name: str) -> Tensor:
        layer, factor = split_name(name)
        tensor = delta[name].double() * weight
        if layer not in whole:
            return tensor
        return strategy.traits.resize(factor, tensor, small[layer], whole[layer])

    def product(layer: LayerSpec) -> Pair:
        own = small[layer.name]
        ended, begun = update.ended, start.tensors
        a, b = f"{layer.name}.A", f"{layer.name}.B"
        now = (layer.scale * present.tensors[b].double(), present.tensors[a].double())
        then = (own.scale * begun[b].double(), begun[a].double())
        last = (own.scale * ended[b], ended[a])
        return stack([now, last, then], [1.0, weight, -weight])

    return replace(
        update,
        delta=AdapterState(spec, LazyTensors(delta, change)),
        start=present,
        weight=1.0,
        products=product if strategy.regauges else None,
    )
