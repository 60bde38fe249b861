"""Nodes: which of Flower's nodes is which client, and which of them can work now."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from flwr.app import ConfigRecord, Message, RecordDict

from fedlora import __version__
from fedlora.errors import shown
from fedlora.flower_records import CONFIG, QUERY, text
from fedlora.server.journal import Event
from fedlora.server.mail import AWAY, Mail
from fedlora.server.posted import Posted
from fedlora.strategies.base import ClientInfo

# a node answers a greeting once it is done with what it does, if it takes no longer than this
GREETING_S = 600.0
# as certificates have it
MAX_NAME = 64
# a node whose worker was not ready is greeted again after so many seconds
GREET_AGAIN_S = 10.0
# characters of a client's name, as at the door (Consortium.Join)
MOST_NAME = 80


@dataclass(frozen=True)
class Seat:
    """A client at its node.

    Attributes:
        node: Flower's id of the node.
        rank: the client trains, at most that of the whole adapter.
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
        misfit: why a client that trains this rank can take no part; empty when it can.
    """

    def __init__(
        self,
        mail: Mail,
        rank: int,
        emit: Callable[[Event], None],
        misfit: Callable[[int], str] = lambda rank: "",
    ) -> None:
        self.mail = mail
        self.rank = rank
        self.emit = emit
        self.misfit = misfit
        self.seats: dict[str, Seat] = {}
        self._registered: dict[int, str] = {}
        self._greeted: dict[int, Posted] = {}
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
        # never forgotten: the reply of a node that has gone off line is still its own
        self._registered.update((node, name) for node, name in nodes.items() if name)
        known = {seat.node for seat in self.seats.values()} | self._refused.keys()
        new = [
            node
            for node in sorted(self._online - known)
            if self._greeted.setdefault(node, Posted()).due
        ]
        for node, message in zip(new, self.mail.push(self._greeting(n) for n in new), strict=True):
            self._greeted[node].add(message)
        asked = {message: node for node, posted in self._greeted.items() for message in posted.ids}
        for message, reply in self.mail.pull(asked).items():
            # unless another greeting of the same node was answered just now
            if posted := self._greeted.pop(asked[message], None):
                self._take(asked[message], reply, posted)

    def present(self) -> list[ClientInfo]:
        """The clients whose node is on line, by name."""
        return [
            ClientInfo(name, seat.rank)
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

    def _take(self, node: int, reply: Message, posted: Posted) -> None:
        if reply.has_error() and reply.error.code in AWAY:
            return
        if reply.has_error():
            self._refuse(node, f"its ClientApp failed: {reply.error.reason}")
            return
        fields: Mapping[str, object] = reply.content.config_records.get(CONFIG, {})
        if error := text(fields, "error"):
            # its worker may come up yet: it is greeted again
            posted.drop(GREET_AGAIN_S)
            self._greeted[node] = posted
            self.emit({"event": "not-ready", "node": str(node), "why": shown(error)})
            return
        name, version = text(fields, "name"), text(fields, "version")
        asked = fields.get("rank", 0)
        # 0 is any
        own = asked if isinstance(asked, int) and asked > 0 else self.rank
        rank = min(own, self.rank)
        registered = self._registered.get(node)
        if version != __version__:
            self._refuse(
                node,
                f"client {shown(name, 80)!r} runs fedlora {shown(version, 40) or 'unknown'}, the "
                f"server {__version__}; install the same version on both",
            )
        elif not name:
            self._refuse(node, "it gave no name; start it with: fedlora client --name NAME")
        elif len(name) > MOST_NAME or not name.isprintable():
            self._refuse(
                node,
                f"it calls itself {shown(name, 80)!r}; expected at most {MOST_NAME} printable "
                "characters",
            )
        elif registered and registered != name:
            self._refuse(
                node,
                f"it calls itself {shown(name, 80)!r}, but its key belongs to {registered!r}",
            )
        elif why := self.misfit(rank):
            self._refuse(node, f"client {name!r}: {why}")
        else:
            # a client that was killed comes back as another node while the old one still counts
            # as on line, so the newest node is the client
            self.seats[name] = Seat(node, rank)
            self.emit({"event": "joined", "client": name, "node": str(node)})

    def _refuse(self, node: int, why: str) -> None:
        why = shown(why)
        self._refused[node] = why
        self.emit({"event": "refused", "node": str(node), "why": why})
