"""Nodes: which of Flower's nodes is which client, and which of them can work now."""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from flwr.app import ConfigRecord, Message, RecordDict

from fedlora import __version__
from fedlora.flower_records import CONFIG, QUERY, text
from fedlora.server.journal import Event
from fedlora.server.mail import AWAY, Mail, Unreadable
from fedlora.strategies.base import ClientInfo

# a node answers a greeting once it is done with what it does, if it takes no longer than this
GREETING_S = 600.0
# as certificates have it
MAX_NAME = 64
# a node whose worker was not ready is greeted again after so many seconds
GREET_AGAIN_S = 10.0


@dataclass(frozen=True)
class Seat:
    """A client at its node.

    Attributes:
        node: Flower's id of the node.
        rank: the largest rank the client can train; 0 for any.
    """

    node: int
    rank: int


class Nodes:
    """Greets every node that comes up, and knows the clients behind those that answered.

    A client is its name. Where Flower authenticates nodes, the name is the one under which the
    node's key was registered, and a node that calls itself otherwise is refused.

    Args:
        mail: to the nodes.
        rank: rank of the whole adapter.
        emit: receives events about clients that are refused.
        equal_ranks: all clients must train the whole rank.
    """

    def __init__(
        self, mail: Mail, rank: int, emit: Callable[[Event], None], *, equal_ranks: bool = False
    ) -> None:
        self.mail = mail
        self.rank = rank
        self.emit = emit
        self.equal_ranks = equal_ranks
        self.seats: dict[str, Seat] = {}
        self._registered: dict[int, str] = {}
        # node -> its greeting (empty once it was answered), and when it may be greeted again
        self._greeted: dict[int, tuple[str, float]] = {}
        self._refused: dict[int, str] = {}
        self._online: set[int] = set()

    def look(self) -> None:
        """Sees who is there, greets who is new, takes in who has answered; never waits."""
        found = self.mail.nodes()
        if found is None:
            # Flower is away, which says nothing of the nodes
            return
        nodes = {node.node_id: node.name for node in found}
        self._online = set(nodes)
        # also of nodes that are away when their answer comes
        self._registered.update({node: name for node, name in nodes.items() if name})
        now = time.monotonic()
        known = {seat.node for seat in self.seats.values()} | self._refused.keys()
        waiting = {node for node, (_, again) in self._greeted.items() if now < again}
        new = sorted(self._online - known - waiting)
        for node, message in zip(new, self.mail.push(self._greeting(n) for n in new), strict=True):
            self._greeted[node] = (message, now + (GREETING_S if message else 0.0))
        asked = {message: node for node, (message, _) in self._greeted.items() if message}
        for message, reply in self.mail.pull(asked).items():
            del self._greeted[asked[message]]
            self._take(asked[message], reply)

    def present(self) -> list[ClientInfo]:
        """The clients whose node is on line, by name."""
        return [
            ClientInfo(name, min(seat.rank or self.rank, self.rank))
            for name, seat in sorted(self.seats.items())
            if seat.node in self._online
        ]

    def gone(self, clients: Iterable[str]) -> set[str]:
        """Those of `clients` whose node is off line."""
        return {name for name in clients if self.seats[name].node not in self._online}

    def refusals(self) -> Mapping[int, str]:
        """Why nodes that are on line take no part."""
        return {node: why for node, why in self._refused.items() if node in self._online}

    def _greeting(self, node: int) -> Message:
        content = RecordDict({CONFIG: ConfigRecord({"version": __version__})})
        return Message(content, node, QUERY, ttl=GREETING_S)

    def _take(self, node: int, reply: Message | Unreadable) -> None:
        if isinstance(reply, Unreadable):
            self._refuse(node, f"its reply cannot be read ({reply.why})")
            return
        if reply.has_error() and reply.error.code in AWAY:
            return
        if reply.has_error():
            self._refuse(node, f"its ClientApp failed: {reply.error.reason}")
            return
        fields: Mapping[str, object] = reply.content.config_records.get(CONFIG, {})
        if error := text(fields, "error"):
            # its worker may come up yet: it is greeted again
            self._greeted[node] = ("", time.monotonic() + GREET_AGAIN_S)
            self.emit({"event": "not-ready", "node": str(node), "why": error})
            return
        name, version = text(fields, "name"), text(fields, "version")
        registered = self._registered.get(node)
        if version != __version__:
            self._refuse(
                node,
                f"client {name!r} runs fedlora {version or 'unknown'}, the server {__version__}; "
                "install the same version on both",
            )
        elif not name:
            self._refuse(node, "it gave no name; start it with: fedlora client --name NAME")
        elif len(name) > MAX_NAME:
            self._refuse(node, f"its name has {len(name)} characters; expected 1 to {MAX_NAME}")
        elif registered and registered != name:
            self._refuse(node, f"it calls itself {name!r}, but its key belongs to {registered!r}")
        else:
            # a client that was killed comes back as another node while the old one still counts
            # as on line, so the newest node is the client
            found = fields.get("rank", 0)
            rank = found if isinstance(found, int) and found > 0 else 0
            if self.equal_ranks and 0 < rank < self.rank:
                self._refuse(
                    node,
                    f"client {name!r} trains rank {rank} at most; the strategy needs rank "
                    f"{self.rank} of everybody",
                )
                return
            self.seats[name] = Seat(node, rank)
            self.emit({"event": "joined", "client": name, "node": str(node)})

    def _refuse(self, node: int, why: str) -> None:
        self._refused[node] = why
        self.emit({"event": "refused", "node": str(node), "why": why})
