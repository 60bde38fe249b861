"""RayLink: every client in a pool of Ray workers, with the bits of the local engine.

A worker is resident: it loads model and data once and then trains any client. What a client
keeps between rounds travels with its task and comes back with its answer, so that only the
server writes the run folder: a cluster needs no shared disk, and a worker that dies in the
middle of a task leaves nothing behind that the second try could see.
"""

import heapq
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import ray

from fedlora.client.state import ClientState
from fedlora.config.job import Job
from fedlora.errors import ConfigError, FedloraError
from fedlora.server.link import Reply, Task
from fedlora.server.machine import machine
from fedlora.simulation.clients import Answer, SimulatedClients
from fedlora.simulation.ray_cluster import Cluster
from fedlora.simulation.ray_pool import Pool
from fedlora.simulation.ray_worker import Done, Errand, Facts
from fedlora.simulation.virtual import Asked, VirtualLink, by_due


class RayLink(VirtualLink):
    """Hands tasks to whichever worker is free, the slowest clients first.

    Workers of its own start with the first task and end with `close`.

    Args:
        clients: the job and its clients.
        state: client -> where it keeps what it needs from round to round.
        progress: called with a client's name when its work begins.
        differs: told of a worker on another kind of machine than the server's.
        pool: workers to use, and to leave running; by default the link starts its own.

    Raises:
        ConfigError: clients whose data are not those of the job, which is all workers know.
    """

    def __init__(
        self,
        clients: SimulatedClients,
        state: Callable[[str], ClientState],
        progress: Callable[[str], None] | None = None,
        differs: Callable[[str], None] | None = None,
        pool: Pool | None = None,
    ) -> None:
        super().__init__(clients.scenario, progress)
        whole = clients.loaded.data.clients
        if any(whole.get(name) is not data for name, data in clients.data.items()):
            raise ConfigError(
                'run.engine = "ray" trains the clients of the job\'s own data; for others set '
                'run.engine = "local"'
            )
        self.clients = clients
        self.state = state
        self.differs = differs or (lambda why: None)
        self.pool: Pool | None = None
        self._given = pool
        # Ray's references to parts on offer, by digest
        self._parts: dict[str, Any] = {}
        # what is in the pool, by client
        self._asked: dict[str, Asked] = {}
        # of submitted work: what is done before it is due
        self._early: dict[str, tuple[int, Done]] = {}
        # client -> seconds its last task took
        self._took: dict[str, float] = {}
        self._machines: list[Mapping[str, Any]] = []

    def cancel(self, client: str) -> None:
        super().cancel(client)
        self._early.pop(client, None)
        if self._asked.pop(client, None) is not None:
            self._workers().forget(client)

    def close(self) -> None:
        pool, self.pool = self.pool, None
        self._parts, self._asked, self._early = {}, {}, {}
        if pool is not None and pool is not self._given:
            pool.close()

    def _order(self, task: Task) -> tuple[float, str]:
        return (-self._took.get(task.client, math.inf), task.client)

    def _begin(self, asked: Asked) -> Iterator[Reply]:
        while self._workers().taken >= self._workers().most:
            yield self._next()
        if refused := self._hand_in(asked):
            yield self._reply(asked, refused)

    def _rest(self) -> Iterator[Reply]:
        while self._asked:
            yield self._next()

    def _next(self) -> Reply:
        asked, number, done = self._take()
        return self._reply(asked, self._settle(asked.client, number, done))

    def _answer(self, asked: Asked) -> Answer:
        self._look_ahead(asked)
        while asked.client not in self._early:
            other, number, done = self._take()
            self._early[other.client] = (number, done)
            self._look_ahead(asked)
        return self._settle(asked.client, *self._early.pop(asked.client))

    def _look_ahead(self, wanted: Asked) -> None:
        """Sees that `wanted` is at work, and as many as fit of those that are due next."""
        pool = self._workers()
        soon = heapq.nsmallest(pool.most, self._queue.values(), key=by_due)
        for asked in (wanted, *soon):
            if asked is not wanted and pool.taken + len(self._early) >= pool.most:
                return
            known = asked.client in self._early or asked.client in self._asked
            if not known and self._works(asked) and (refused := self._hand_in(asked)):
                self._early[asked.client] = (0, Done(refused, None, 0.0))

    def _hand_in(self, asked: Asked) -> Answer | None:
        """Gives a task to the pool; or says why its client cannot do it."""
        number = asked.broadcast.plan.round
        try:
            state = self.state(asked.client).payload_before(number)
        except FedloraError as e:
            return Answer(b"", b"", frozenset(), str(e))
        parts = {d: self._reference(d, asked) for d in asked.broadcast.parts.values()}
        self._asked[asked.client] = asked
        self._workers().add(Errand(asked.task, number, parts, state))
        return None

    def _take(self) -> tuple[Asked, int, Done]:
        errand, done = self._workers().next()
        return self._asked.pop(errand.task.client), errand.round, done

    def _settle(self, client: str, number: int, done: Done) -> Answer:
        """Keeps what the client wants kept, and gives its answer."""
        if done.state is not None:
            self.state(client).save_payload(number, done.state)
        self._took[client] = done.seconds
        return done.answer

    def _reference(self, digest: str, asked: Asked) -> Any:
        if digest not in self._parts:
            # what is no longer on offer is let go; the errands at work hold what they need
            self._parts = {d: held for d, held in self._parts.items() if d in asked.parts}
            self._parts[digest] = ray.put(asked.parts[digest])
        return self._parts[digest]

    def _workers(self) -> Pool:
        if self.pool is None:
            self.pool = self._given
            if self.pool is None:
                self.pool = new_pool(self.clients.job, len(self.clients.data))
            self.pool.open(self.clients.job, self._check, self.progress)
        return self.pool

    def _check(self, facts: Facts) -> None:
        """Refuses a worker that would train something else than the server thinks."""
        loaded, here = self.clients.loaded, machine(self.clients.job.run.threads)
        examples = {name: len(data.train) for name, data in self.clients.data.items()}
        found = {name: facts.examples.get(name, 0) for name in examples}
        what = ""
        if facts.machine["torch"] != here["torch"]:
            what = f"torch {facts.machine['torch']}, the server {here['torch']}"
        elif facts.spec_digest != loaded.initial.spec.digest():
            what = "another base model or adapter than the server"
        elif found != examples:
            name = next(name for name in examples if found[name] != examples[name])
            what = f"{found[name]} examples of client {name!r}, the server {examples[name]}"
        if what:
            raise ConfigError(
                f"a Ray worker on {facts.host} has {what}; every machine of the cluster needs the "
                "same versions, model and data"
            )
        if facts.machine != here and facts.machine not in self._machines:
            self._machines.append(facts.machine)
            self.differs(
                f"a Ray worker on {facts.host} runs on another machine than the server "
                f"({facts.machine['processor']}, {facts.machine['system']}); another processor "
                "or system may give other bits"
            )


def new_pool(job: Job, clients: int) -> Pool:
    """Workers for a job with so many clients.

    Raises:
        ConfigError: no such cluster, or one too small for a worker.
    """
    return Pool(Cluster(job, min(job.federation.clients_per_round or clients, clients)))
