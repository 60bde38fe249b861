"""Pool: Ray workers that take errands as they become free, and are replaced when they die."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from fedlora.config.job import Job
from fedlora.errors import FedloraError, RunFailed
from fedlora.simulation.clients import Answer
from fedlora.simulation.ray_cluster import Cluster
from fedlora.simulation.ray_worker import Done, Errand, Facts, Worker

# a task that kills its worker each time must end, and so must a pool whose workers never start
MOST_DEATHS = 3
START_LIMIT_S = 900.0


@dataclass
class _Seat:
    """A worker and what it has been given, the oldest first."""

    worker: Any
    loading: Any = None
    given: deque[tuple[Any, Errand]] = field(default_factory=deque)
    pid: int = 0


class Pool:
    """Hands errands to whichever worker is free.

    One pool can serve several runs, one after the other, whose jobs have the same threads and
    device: `open` it for each.

    Args:
        cluster: where the workers run; ends with the pool.

    Attributes:
        most: errands that may be in the pool at the same time; bounds the server's memory.
        deaths: workers that died.
    """

    def __init__(self, cluster: Cluster) -> None:
        self.size = cluster.size
        self.most = 3 * cluster.size
        self.deaths = 0
        self._cluster = cluster
        self._job = Job()
        self._check: Callable[[Facts], None] = lambda facts: None
        self._progress: Callable[[str], None] = lambda client: None
        self._waiting: deque[Errand] = deque()
        # client -> how many workers have died over its errand
        self._died: dict[str, int] = {}
        self._never_started = 0
        self._lost: deque[tuple[Errand, Done]] = deque()
        self._seats = [_Seat(cluster.start(Worker)) for _ in range(cluster.size)]

    def open(
        self, job: Job, check: Callable[[Facts], None], progress: Callable[[str], None]
    ) -> None:
        """Has all workers load the model and the data of a job.

        Args:
            job: what comes next; errands of another one are dropped.
            check: refuses a worker whose facts are not the server's.
            progress: called with a client's name when a worker begins its task.
        """
        self.forget()
        self._job, self._check, self._progress = job, check, progress
        self._never_started = 0
        for seat in self._seats:
            seat.loading = seat.worker.load.remote(self._job)

    @property
    def taken(self) -> int:
        """Errands in the pool, waiting or at work."""
        return len(self._waiting) + len(self._lost) + sum(len(seat.given) for seat in self._seats)

    def at_work(self) -> dict[int, list[str]]:
        """Process of every worker that has loaded -> the clients it was given, oldest first."""
        return {
            seat.pid: [errand.task.client for _, errand in seat.given]
            for seat in self._seats
            if seat.loading is None
        }

    def add(self, errand: Errand) -> None:
        """Takes an errand; there must be fewer than `most`."""
        self._waiting.append(errand)
        self._give()

    def next(self) -> tuple[Errand, Done]:
        """Waits for whichever errand is done first.

        Raises:
            FedloraError: a worker cannot load what the server has loaded.
            RunFailed: workers die before they have loaded, or Ray itself fails.
        """
        while not self._lost:
            self._give()
            if found := self._wait():
                return found
        return self._lost.popleft()

    def forget(self, client: str | None = None) -> None:
        """Drops the errands of a client, by default of all; what is at work is not stopped."""
        self._waiting = deque(e for e in self._waiting if client not in (None, e.task.client))
        self._lost = deque(x for x in self._lost if client not in (None, x[0].task.client))
        for seat in self._seats:
            seat.given = deque(x for x in seat.given if client not in (None, x[1].task.client))

    def close(self) -> None:
        """Ends the workers, and Ray if it was started for them."""
        for seat in self._seats:
            ray.kill(seat.worker)
        self._seats = []
        self._cluster.close()

    def _give(self) -> None:
        # a second errand hides the way to the server and back, but near the end of a round it
        # would wait behind a slow one while another worker is idle
        for deep in (1, 2):
            for seat in self._seats:
                if deep == 2 and len(self._waiting) < self.size:
                    return
                if self._waiting and seat.loading is None and len(seat.given) < deep:
                    errand = self._waiting.popleft()
                    seat.given.append((seat.worker.work.remote(errand), errand))
                    if deep == 1:
                        self._progress(errand.task.client)

    def _wait(self) -> tuple[Errand, Done] | None:
        by_reference = {}
        for seat in self._seats:
            if seat.loading is not None:
                by_reference[seat.loading] = seat
            for reference, _ in seat.given:
                by_reference[reference] = seat
        starting = all(seat.loading is not None for seat in self._seats)
        try:
            ready, _ = ray.wait(
                list(by_reference), num_returns=1, timeout=START_LIMIT_S if starting else None
            )
            if not ready:
                raise RunFailed(
                    f"no Ray worker was ready after {START_LIMIT_S:.0f} s; see that the cluster "
                    "has free processors, then continue with: fedlora resume"
                )
            return self._collect(by_reference[ready[0]], ready[0])
        except RayTaskError as e:
            # what a worker raised on purpose is the user's to mend
            if isinstance(e.cause, FedloraError):
                raise e.cause from None
            if isinstance(e.cause, RayError):
                raise _failed(e.cause) from e
            raise
        except RayError as e:
            raise _failed(e) from e

    def _collect(self, seat: _Seat, reference: Any) -> tuple[Errand, Done] | None:
        try:
            found = ray.get(reference)
        except RayActorError as e:
            self._replace(seat, e)
            return None
        if reference == seat.loading:
            self._check(found)
            seat.loading, seat.pid, self._never_started = None, found.pid, 0
            return None
        errand = next(errand for ref, errand in seat.given if ref == reference)
        seat.given = deque(x for x in seat.given if x[0] != reference)
        self._died.pop(errand.task.client, None)
        if seat.given:
            self._progress(seat.given[0][1].task.client)
        return errand, found

    def _replace(self, seat: _Seat, error: RayActorError) -> None:
        self.deaths += 1
        if seat.loading is not None:
            self._never_started += 1
            if self._never_started > MOST_DEATHS:
                raise RunFailed(
                    f"{self._never_started} Ray workers in a row died before they had loaded the "
                    f"model and the data ({str(error).splitlines()[0]}); give them more memory, "
                    "or set FEDLORA_RAY_WORKERS to fewer, then continue with: fedlora resume"
                ) from error
        errands = [errand for _, errand in seat.given]
        # the oldest is the one that it was doing
        for errand in errands[:1]:
            client = errand.task.client
            self._died[client] = self._died.get(client, 0) + 1
            if self._died[client] >= MOST_DEATHS:
                why = f"the worker process died {MOST_DEATHS} times over this client's task"
                empty = Answer(b"", b"", frozenset(errand.parts), why)
                self._lost.append((errand, Done(empty, None, 0.0)))
                self._died.pop(client)
                errands = errands[1:]
        self._waiting.extendleft(reversed(errands))
        worker = self._cluster.start(Worker)
        self._seats[self._seats.index(seat)] = _Seat(worker, worker.load.remote(self._job))


def _failed(error: RayError) -> RunFailed:
    why = (str(error).splitlines() or [""])[0] or type(error).__name__
    return RunFailed(
        f"Ray failed: {why}; every committed round stands. Continue with: fedlora resume"
    )
