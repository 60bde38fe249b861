"""Worker: a process of the Ray engine that holds model and data and trains any client."""

import os
import platform
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError

from fedlora.client.state import CarriedState
from fedlora.config.job import Job
from fedlora.models.loaded import load
from fedlora.server.link import Task
from fedlora.server.machine import machine
from fedlora.simulation.clients import Answer, SimulatedClients, answer

# a part that does not come would hold a worker for ever
PART_LIMIT_S = 600.0


@dataclass(frozen=True)
class Errand:
    """A task as it goes to a worker, with all that the client is given.

    Attributes:
        task: the task.
        round: its round.
        parts: digest -> Ray's reference to the bytes of a part.
        state: what the client kept from earlier rounds, encoded.
    """

    task: Task
    round: int
    parts: Mapping[str, Any]
    state: bytes


@dataclass(frozen=True)
class Done:
    """A task as it comes back.

    Attributes:
        answer: what the client sends.
        state: what it keeps of this round, encoded; None for nothing.
        seconds: how long it worked.
    """

    answer: Answer
    state: bytes | None
    seconds: float


@dataclass(frozen=True)
class Facts:
    """What a worker has loaded, to be compared with what the server has.

    Attributes:
        host, pid: its machine and process.
        spec_digest: of the adapter's spec, which names the base model.
        examples: client -> number of training examples.
        machine: what figures depend on besides the job.
    """

    host: str
    pid: int
    spec_digest: str
    examples: Mapping[str, int]
    machine: Mapping[str, Any]


class Worker:
    """Holds a job's model and data; one client at a time trains on them.

    Made by Ray, whose workers have a device of their own: "cuda:3" of the job is the first and
    only device a worker sees.
    """

    def __init__(self) -> None:
        # parts used in the newest round and in the one before
        self._new: dict[str, bytes] = {}
        self._old: dict[str, bytes] = {}
        self._round = 0
        self._clients: SimulatedClients | None = None
        self._lost: RayError | None = None

    def load(self, job: Job) -> Facts:
        """Loads the job's model and data.

        Raises:
            ConfigError, DataError, ModelError, AdapterError: see `fedlora.models.loaded.load`.
        """
        # the model of the job before need not be in memory at the same time
        self._clients = None
        if job.run.device.startswith("cuda"):
            job = job.model_copy(update={"run": job.run.model_copy(update={"device": "cuda"})})
        loaded = load(job)
        self._clients = clients = SimulatedClients(job, loaded)
        self._new, self._old, self._round = {}, {}, 0
        return Facts(
            platform.node(),
            os.getpid(),
            loaded.initial.spec.digest(),
            {name: len(data.train) for name, data in clients.data.items()},
            machine(job.run.threads),
        )

    def work(self, errand: Errand) -> Done:
        """Does one client's task."""
        started = time.perf_counter()
        self._lost = None
        if errand.round > self._round:
            self._round, self._old, self._new = errand.round, self._new, {}
        memory = CarriedState(errand.state)
        clients = self._clients
        assert clients is not None, "a worker loads before it works"
        found = answer(
            lambda client, manifest, fetch: clients.work(client, manifest, fetch, memory),
            clients.scenario,
            errand.task,
            lambda digest: self._part(digest, errand.parts[digest]),
        )
        if self._lost is not None:
            # Ray's failure, not the client's
            raise self._lost
        return Done(found, memory.saved, time.perf_counter() - started)

    def _part(self, digest: str, reference: Any) -> bytes:
        if digest in self._new:
            return self._new[digest]
        try:
            found = self._old.get(digest) or ray.get(reference, timeout=PART_LIMIT_S)
        except RayError as e:
            self._lost = e
            raise
        self._new[digest] = found
        return found
