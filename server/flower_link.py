"""FlowerLink: clients on other machines. Flower carries who does what, the exchange the bytes."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict

from fedlora.flower_records import CONFIG, PARTS, PAYLOAD, STYPE, TRAIN, text
from fedlora.server.journal import Event
from fedlora.server.link import BUDGET_EXHAUSTED, Reply, Task
from fedlora.server.mail import AWAY, Mail
from fedlora.server.nodes import Nodes
from fedlora.server.offers import Offers, ReceivedBytes
from fedlora.server.posted import Posted
from fedlora.strategies.base import ClientInfo
from fedlora.wire import decode_broadcast, sha256

# seconds between two looks at the disk, at Flower's replies, and at the nodes
LOOK_S, PULL_S, NODES_S = 0.05, 0.3, 2.0
LOOK_NODES_S = 0.25
# a client that is restarted is back before that
RETURN_S = 10.0


@dataclass
class _Waiting:
    """A task whose reply has not come.

    Attributes:
        posted: the message that asks for it.
        reply: Flower's, which came before the update itself.
    """

    task: Task
    posted: Posted = field(default_factory=Posted)
    reply: Message | None = None


@dataclass
class _Clocks:
    """When something was last looked at."""

    seen: dict[str, float] = field(default_factory=dict)

    def due(self, what: str, seconds: float) -> bool:
        now = time.monotonic()
        if now - self.seen.get(what, float("-inf")) < seconds:
            return False
        self.seen[what] = now
        return True


class FlowerLink:
    """The clients of a deployed run.

    An update counts as soon as the exchange has it whole: Flower's own reply only matters when
    it brings an error, or, without an exchange, the bytes themselves. What a client uploaded
    before a crash of the server is taken from the exchange and not asked for again.

    Args:
        job_toml: the job, as clients get it.
        base_fingerprint: of the server's base model.
        mail: to Flower's nodes.
        nodes: who is who.
        offers: where parts are offered and updates come in; None when both ride in Flower's
            messages.
        enough: a round waits for so many clients, for a while.
        patience_s: how long it waits for them.
        emit: receives events.
    """

    def __init__(
        self,
        job_toml: str,
        base_fingerprint: str,
        mail: Mail,
        nodes: Nodes,
        offers: Offers | None,
        *,
        enough: int,
        patience_s: float,
        emit: Callable[[Event], None],
    ) -> None:
        self.job_toml = job_toml
        self.base_fingerprint = base_fingerprint
        self.mail = mail
        self.nodes = nodes
        self.offers = offers
        self.enough = enough
        self.patience_s = patience_s
        self.emit = emit
        self._clocks = _Clocks()
        self._acknowledged: dict[str, list[str]] = {}
        self._last: set[str] = set()

    def roster(self) -> Sequence[ClientInfo]:
        """The clients that are there, after a bounded wait for enough of them.

        A client of the last round that is away is waited for a moment, so that one that is
        restarted between two rounds changes nothing.
        """
        present = self.gather(self.enough)
        ends = time.monotonic() + min(RETURN_S, self.patience_s)
        while self._last - {client.name for client in present} and time.monotonic() < ends:
            time.sleep(LOOK_NODES_S)
            self.nodes.look()
            present = self.nodes.present()
        self._last = {client.name for client in present}
        return present

    def gather(self, wanted: int) -> Sequence[ClientInfo]:
        """The clients that are there, after a bounded wait for so many."""
        ends = time.monotonic() + self.patience_s
        said: list[str] | None = None
        while True:
            self.nodes.look()
            present = self.nodes.present()
            if len(present) >= wanted or time.monotonic() >= ends:
                return present
            names = [client.name for client in present]
            if names != said:
                said = names
                self.emit({"event": "waiting", "clients": names, "wanted": wanted})
            time.sleep(LOOK_NODES_S)

    def exchange(
        self, tasks: Sequence[Task], parts: Mapping[str, bytes], deadline_s: float
    ) -> Iterator[Reply]:
        started = time.monotonic()
        if not tasks:
            return
        plan = decode_broadcast(tasks[0].manifest).plan
        if self.offers is not None:
            self.offers.open(plan.round, plan.attempt, parts)
        waiting = {task.client: _Waiting(task) for task in tasks}
        while waiting and (passed := time.monotonic() - started) < deadline_s:
            # before anything is posted: a server that was restarted finds what came in before
            yield from self._arrived(waiting, started)
            self._post(waiting, parts, deadline_s - passed)
            if self._clocks.due("replies", PULL_S):
                yield from self._replied(waiting, started)
            if self._clocks.due("nodes", NODES_S):
                self.nodes.look()
                for name in self.nodes.gone(waiting):
                    # posted again if it comes back in time
                    waiting[name].posted.drop()
            if waiting:
                time.sleep(LOOK_S)
        yield from self._arrived(waiting, started)

    def _arrived(self, waiting: dict[str, _Waiting], started: float) -> Iterator[Reply]:
        """Updates that the exchange has whole."""
        if self.offers is None:
            return
        for client, found in self.offers.received(list(waiting)):
            yield self._reply(waiting.pop(client).task, found, started)

    def _reply(self, task: Task, found: ReceivedBytes, started: float) -> Reply:
        self._acknowledged.setdefault(task.client, []).append(sha256(task.manifest))
        return Reply(
            task.client,
            found.manifest,
            found.payload,
            len(task.manifest) + found.bytes_down,
            time.monotonic() - started,
        )

    def _replied(self, waiting: dict[str, _Waiting], started: float) -> Iterator[Reply]:
        """Replies by Flower: errors, and updates that ride along."""
        asked = {
            message: name for name, w in waiting.items() if not w.reply for message in w.posted.ids
        }
        for message, reply in self.mail.pull(asked).items():
            client = asked[message]
            if client not in waiting:
                # it has answered twice
                continue
            task, down = waiting[client].task, 0
            waiting[client].reply = reply
            error, code = "", ""
            if reply.has_error() and reply.error.code in AWAY:
                # posted again when its node is back, or back under another number
                waiting[client].posted.drop()
                waiting[client].reply = None
                self.nodes.look()
                continue
            if reply.has_error():
                error, code = f"its ClientApp failed: {reply.error.reason}", "FLOWER"
            else:
                fields: Mapping[str, object] = reply.content.config_records.get(CONFIG, {})
                error, code = text(fields, "error"), text(fields, "code")
                number = fields.get("bytes_down", 0)
                down = number if isinstance(number, int) and 0 <= number < 2**62 else 0
            if error:
                del waiting[client]
                seconds = time.monotonic() - started
                why = f"{code}: {error}" if code else error
                kind = code if code == BUDGET_EXHAUSTED else "CLIENT_ERROR"
                down += len(task.manifest)
                yield Reply(client, b"", b"", down, seconds, error=why, code=kind)
            elif self.offers is None:
                del waiting[client]
                yield self._reply(task, _inline(reply, down), started)

    def _post(
        self, waiting: Mapping[str, _Waiting], parts: Mapping[str, bytes], left_s: float
    ) -> None:
        """Posts the tasks that no node has yet, and those that nothing was heard of for long."""
        gone = self.nodes.gone(waiting)
        new = [
            name for name, w in waiting.items() if w.posted.due and not w.reply and name not in gone
        ]
        messages = [self._message(waiting[name].task, parts, left_s) for name in new]
        for name, message in zip(new, self.mail.push(messages), strict=True):
            waiting[name].posted.add(message)

    def _message(self, task: Task, parts: Mapping[str, bytes], left_s: float) -> Message:
        broadcast = decode_broadcast(task.manifest)
        node = self.nodes.seats[task.client].node
        record = ConfigRecord({"job": self.job_toml, "manifest": task.manifest, "exchange": ""})
        record["base"] = self.base_fingerprint
        record["acknowledged"] = self._acknowledged.pop(task.client, [])
        content = RecordDict({CONFIG: record})
        if self.offers is None:
            needed = sorted(set(broadcast.parts.values()))
            content[PARTS] = ArrayRecord({digest: _raw(parts[digest]) for digest in needed})
        else:
            record.update(self.offers.tickets(task, broadcast, node, left_s))
        group = str(broadcast.plan.round)
        # Flower keeps a reply no longer than this
        return Message(content, node, TRAIN, ttl=left_s + 60, group_id=group)


def _raw(data: bytes) -> Array:
    return Array("uint8", (len(data),), STYPE, data)


def _inline(reply: Message, bytes_down: int) -> ReceivedBytes:
    """The update in a reply of Flower; empty fields where it has none."""
    fields: Mapping[str, object] = reply.content.config_records.get(CONFIG, {})
    manifest = fields.get("manifest", b"")
    arrays = reply.content.array_records.get(PAYLOAD)
    payload = b"".join(array.data for array in arrays.values()) if arrays else b""
    return ReceivedBytes(manifest if isinstance(manifest, bytes) else b"", payload, bytes_down)
