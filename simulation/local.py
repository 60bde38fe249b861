"""LocalLink: every client in this process, through the same bytes as over a network."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedlora.errors import FedloraError, StorageError
from fedlora.messages import ClientUpdate
from fedlora.server.link import Reply, Task
from fedlora.simulation.scenario import Scenario
from fedlora.storage import write_atomic
from fedlora.strategies.base import ClientInfo
from fedlora.wire import decode_broadcast, encode_json, encode_update

# client -> part -> digest
Held = dict[str, list[str]]
Work = Callable[[str, bytes, Callable[[str], bytes]], ClientUpdate]


@dataclass(frozen=True)
class _Due:
    """Submitted work, done when its reply is due."""

    seconds: float
    task: Task
    parts: Mapping[str, bytes]
    deadline_s: float


class LocalLink:
    """Runs tasks one after the other, or, submitted, in the order in which they are due.

    After a resume of an asynchronous run, bytes down count parts once more that clients held.

    Args:
        scenario: who exists, who is absent, slow or hostile.
        work: (client, manifest, fetch) -> update; does one client's part of a round.
        progress: called with a client's name when its work begins.
    """

    def __init__(
        self, scenario: Scenario, work: Work, progress: Callable[[str], None] | None = None
    ) -> None:
        self.scenario = scenario
        self.work = work
        self.progress = progress
        # digests of the parts each client holds from earlier rounds
        self._held: Held = {}
        # of asynchronous work: virtual seconds so far, and what is at work
        self._clock = 0.0
        self._queue: dict[str, _Due] = {}
        self._path: Path | None = None
        # of the last two rounds: the last one may be cut off before its commit
        self._by_round: dict[int, Held] = {}

    def remember(self, path: Path, committed: int) -> None:
        """Keeps what clients hold in a file, and takes up what they held after a round.

        A resumed run then counts the same bytes as one that was never interrupted. Without a
        readable file clients hold nothing, and are sent everything once more.

        Args:
            path: the file.
            committed: the round the run goes on from.
        """
        self._path = path
        try:
            found = json.loads(path.read_text("utf-8"))
            self._by_round = {int(n): held for n, held in found.items() if int(n) <= committed}
        except (OSError, ValueError, AttributeError):
            self._by_round = {}
        self._held = dict(self._by_round.get(committed, {}))

    def roster(self) -> Sequence[ClientInfo]:
        return self.scenario.clients

    def submit(
        self, task: Task, parts: Mapping[str, bytes], deadline_s: float, due: float | None = None
    ) -> float:
        plan = decode_broadcast(task.manifest).plan
        if due is None:
            seconds = self.scenario.virtual_seconds(task.client, plan.local_steps)
            if self.scenario.absent(task.client, plan.round, plan.attempt):
                seconds = deadline_s
            due = self._clock + min(seconds, deadline_s)
        self._queue[task.client] = _Due(due, task, parts, deadline_s)
        return due

    def next_reply(self) -> Reply:
        client = min(self._queue, key=lambda name: (self._queue[name].seconds, name))
        due = self._queue.pop(client)
        self._clock = max(self._clock, due.seconds)
        reply = self._one(due.task, due.parts, due.deadline_s)
        return reply or Reply(client, b"", b"", 0, due.seconds)

    def cancel(self, client: str) -> None:
        del self._queue[client]

    def clock(self) -> float:
        return self._clock

    def set_clock(self, seconds: float) -> None:
        self._clock = seconds

    def exchange(
        self, tasks: Sequence[Task], parts: Mapping[str, bytes], deadline_s: float
    ) -> Iterator[Reply]:
        for task in sorted(tasks, key=lambda task: task.client):
            reply = self._one(task, parts, deadline_s)
            if reply is not None:
                yield reply
        if self._path is not None and tasks:
            number = decode_broadcast(tasks[0].manifest).plan.round
            kept = {n: held for n, held in self._by_round.items() if n == number - 1}
            self._by_round = {**kept, number: dict(self._held)}
            write_atomic(
                self._path, encode_json({str(n): held for n, held in self._by_round.items()})
            )

    def _one(self, task: Task, parts: Mapping[str, bytes], deadline_s: float) -> Reply | None:
        broadcast = decode_broadcast(task.manifest)
        plan, client = broadcast.plan, task.client
        if self.scenario.absent(client, plan.round, plan.attempt):
            return None
        held = set(self._held.get(client, ()))
        fetched: set[str] = set()

        def fetch(digest: str) -> bytes:
            fetched.add(digest)
            return parts[digest]

        def down() -> int:
            return len(task.manifest) + sum(len(parts[d]) for d in fetched - held)

        seconds = self.scenario.virtual_seconds(client, plan.local_steps)
        if seconds > deadline_s:
            # a straggler would train in vain: its reply comes when the round is closed, and
            # it fetches everything it could need
            fetched.update(broadcast.parts.values())
            self._held[client] = sorted(broadcast.parts.values())
            return Reply(client, b"", b"", down(), deadline_s)
        if self.progress:
            self.progress(client)
        try:
            update = self.work(client, task.manifest, fetch)
        except StorageError:
            raise
        except FedloraError as e:
            return Reply(client, b"", b"", down(), seconds, error=str(e))
        except Exception as e:  # memory that ran out, say; it must not end the round of the others
            why = f"{type(e).__name__}: {(str(e).splitlines() or [''])[0]}"
            return Reply(client, b"", b"", down(), seconds, error=why)
        finally:
            # what the broadcast still names is kept; the rest is of no more use
            now = set(broadcast.parts.values())
            self._held[client] = sorted((held & now) | fetched)
        manifest, payload = encode_update(self.scenario.tamper(update))
        return Reply(client, manifest, payload, down(), seconds)
