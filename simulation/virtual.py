"""VirtualLink: the clients of a scenario in virtual time, wherever their work is done."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from fedlora.messages import Broadcast
from fedlora.server.link import Reply, Task
from fedlora.simulation.clients import Answer
from fedlora.simulation.held import HeldParts
from fedlora.simulation.scenario import Scenario
from fedlora.strategies.base import ClientInfo
from fedlora.wire import decode_broadcast


@dataclass(frozen=True)
class Asked:
    """A task with what it was asked with.

    Attributes:
        due: when its reply is due, on the link's clock; only of submitted work.
    """

    task: Task
    broadcast: Broadcast
    parts: Mapping[str, bytes]
    deadline_s: float
    due: float = 0.0

    @property
    def client(self) -> str:
        """Who was asked."""
        return self.task.client


class VirtualLink(ABC):
    """Decides who answers and when, and counts bytes; where clients work, a subclass says.

    Args:
        scenario: who exists, who is absent, slow or hostile.
        progress: called with a client's name when its work begins.
    """

    def __init__(self, scenario: Scenario, progress: Callable[[str], None] | None = None) -> None:
        self.scenario = scenario
        self.progress = progress or (lambda client: None)
        self.held = HeldParts()
        # of asynchronous work: virtual seconds so far, and what is at work
        self._clock = 0.0
        self._queue: dict[str, Asked] = {}

    @abstractmethod
    def _begin(self, asked: Asked) -> Iterator[Reply]:
        """Takes one task of a round, and yields replies that are there."""

    @abstractmethod
    def _rest(self) -> Iterator[Reply]:
        """Yields the replies to all tasks of the round that were taken."""

    @abstractmethod
    def _answer(self, asked: Asked) -> Answer:
        """The answer to a submitted task, which is no longer in the queue."""

    @abstractmethod
    def close(self) -> None:
        """Lets go of whatever does the work, until there is work again."""

    def roster(self) -> Sequence[ClientInfo]:
        return self.scenario.clients

    def exchange(
        self, tasks: Sequence[Task], parts: Mapping[str, bytes], deadline_s: float
    ) -> Iterator[Reply]:
        for task in sorted(tasks, key=self._order):
            asked = Asked(task, decode_broadcast(task.manifest), parts, deadline_s)
            if self._absent(asked):
                continue
            if self._late(asked):
                yield self._too_late(asked)
            else:
                yield from self._begin(asked)
        yield from self._rest()
        if tasks:
            self.held.commit(decode_broadcast(tasks[0].manifest).plan.round)

    def submit(
        self, task: Task, parts: Mapping[str, bytes], deadline_s: float, due: float | None = None
    ) -> float:
        asked = Asked(task, decode_broadcast(task.manifest), parts, deadline_s)
        if due is None:
            seconds = deadline_s if self._absent(asked) else self._seconds(asked)
            due = self._clock + min(seconds, deadline_s)
        self._queue[task.client] = Asked(task, asked.broadcast, parts, deadline_s, due)
        return due

    def next_reply(self) -> Reply:
        asked = self._queue.pop(min(self._queue.values(), key=by_due).client)
        self._clock = max(self._clock, asked.due)
        if self._absent(asked):
            return Reply(asked.client, b"", b"", 0, asked.due)
        if self._late(asked):
            return self._too_late(asked)
        return self._reply(asked, self._answer(asked))

    def cancel(self, client: str) -> None:
        del self._queue[client]

    def clock(self) -> float:
        return self._clock

    def set_clock(self, seconds: float) -> None:
        self._clock = seconds

    def _order(self, task: Task) -> tuple[float, str]:
        """Sorts the tasks of a round; the order changes no result."""
        return (0.0, task.client)

    def _works(self, asked: Asked) -> bool:
        """The client will do the work, rather than be absent or late."""
        return not self._absent(asked) and not self._late(asked)

    def _absent(self, asked: Asked) -> bool:
        plan = asked.broadcast.plan
        return self.scenario.absent(asked.client, plan.round, plan.attempt)

    def _late(self, asked: Asked) -> bool:
        return self._seconds(asked) > asked.deadline_s

    def _seconds(self, asked: Asked) -> float:
        return self.scenario.virtual_seconds(asked.client, asked.broadcast.plan.local_steps)

    def _too_late(self, asked: Asked) -> Reply:
        """The empty reply of a straggler, which would train in vain.

        It comes when the round is closed, and the client fetches everything it could need.
        """
        every = frozenset(asked.broadcast.parts.values())
        down = self._down(asked, every)
        return Reply(asked.client, b"", b"", down, asked.deadline_s)

    def _reply(self, asked: Asked, answer: Answer) -> Reply:
        return Reply(
            asked.client,
            answer.manifest,
            answer.payload,
            self._down(asked, answer.fetched),
            self._seconds(asked),
            error=answer.error,
            code=answer.code,
        )

    def _down(self, asked: Asked, fetched: frozenset[str]) -> int:
        sent = self.held.fetch(asked.client, fetched, asked.broadcast.parts.values())
        return len(asked.task.manifest) + sum(len(asked.parts[digest]) for digest in sent)


def by_due(asked: Asked) -> tuple[float, str]:
    """Sorts submitted work by when it is due, and then by name."""
    return (asked.due, asked.client)
