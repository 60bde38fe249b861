"""LocalLink: every client in this process, through the same bytes as over a network."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from fedlora.errors import FedloraError, StorageError
from fedlora.messages import ClientUpdate
from fedlora.server.link import Reply, Task
from fedlora.simulation.scenario import Scenario
from fedlora.storage import write_atomic
from fedlora.strategies.base import ClientInfo
from fedlora.wire import decode_broadcast, encode_json, encode_update

# client -> part -> digest
Held = dict[str, dict[str, str]]
Work = Callable[[str, bytes, Callable[[str], bytes]], ClientUpdate]


class LocalLink:
    """Runs tasks one after the other.

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
        # digests each client holds from earlier rounds, by part
        self._held: Held = {}
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
        held = set(self._held.get(client, {}).values())
        down = len(task.manifest)
        down += sum(len(parts[d]) for d in set(broadcast.parts.values()) if d not in held)
        self._held[client] = dict(broadcast.parts)
        seconds = self.scenario.virtual_seconds(client, plan.local_steps)
        if seconds > deadline_s:
            # a straggler would train in vain: its reply comes when the round is closed
            return Reply(client, b"", b"", down, deadline_s)
        if self.progress:
            self.progress(client)
        try:
            update = self.work(client, task.manifest, parts.__getitem__)
        except StorageError:
            raise
        except FedloraError as e:
            return Reply(client, b"", b"", down, seconds, error=str(e))
        manifest, payload = encode_update(self.scenario.tamper(update))
        return Reply(client, manifest, payload, down, seconds)
