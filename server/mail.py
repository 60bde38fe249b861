"""Mail: messages to Flower's nodes and their replies, over a Grid that may be away for a while."""

import time
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import httpx
from flwr.app import Message
from flwr.common.constant import ErrorCode
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid

from fedlora.errors import RunFailed

# what Flower answers itself for a node that is off line, or a ClientApp that was killed
AWAY = (
    ErrorCode.NODE_UNAVAILABLE,
    ErrorCode.MESSAGE_UNAVAILABLE,
    ErrorCode.REPLY_MESSAGE_UNAVAILABLE,
    # the worker goes on without its caller
    ErrorCode.CLIENT_APP_CRASHED,
)

# a SuperLink that was killed is back before that, or an operator is needed
AWAY_S = 120.0


@dataclass(frozen=True)
class Unreadable:
    """Stands for a reply whose bytes Flower cannot unpack.

    Attributes:
        why: the kind of the error.
    """

    why: str


class Mail:
    """What a ServerApp does with its Grid.

    A SuperLink that is away is not an error until it has been so for two minutes: its
    supervisor starts it again, and Flower keeps its messages on disk.

    Args:
        grid: of the run.
    """

    def __init__(self, grid: Grid) -> None:
        self.grid = grid
        self._away_since: float | None = None

    def nodes(self) -> list[NodeInfo] | None:
        """The nodes that are on line; None while the SuperLink is away."""
        found: list[NodeInfo] | None = None
        with self._patience():
            found = list(self.grid.get_nodes())
        return found

    def push(self, messages: Iterable[Message]) -> list[str]:
        """Posts messages and gives their ids, each empty when it could not be posted."""
        batch = list(messages)
        ids = [""] * len(batch)
        if batch:
            with self._patience():
                ids = [str(i or "") for i in self.grid.push_messages(batch)]
        return ids

    def pull(self, ids: Collection[str]) -> dict[str, Message | Unreadable]:
        """The replies that are there, by the id of the message they answer.

        One at a time: a reply that cannot be unpacked must not take the others with it. It
        counts as an error of its sender.
        """
        found: dict[str, Message | Unreadable] = {}
        for message in ids:
            with self._patience():
                try:
                    for reply in self.grid.pull_messages([message]):
                        found[message] = reply
                except httpx.HTTPError:
                    raise
                except Exception as e:  # whatever its bytes make Flower raise
                    found[message] = Unreadable(type(e).__name__)
        return found

    @contextmanager
    def _patience(self) -> Iterator[None]:
        try:
            yield
        except httpx.HTTPError as e:
            now = time.monotonic()
            self._away_since = self._away_since or now
            if now - self._away_since > AWAY_S:
                raise RunFailed(
                    f"Flower's SuperLink has been away for {AWAY_S:.0f} s ({e}); start the server "
                    "again, and the run goes on from its last committed round"
                ) from e
        else:
            self._away_since = None
