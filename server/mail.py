"""Mail: messages to Flower's nodes and their replies, over a Grid that may be away for a while."""

import logging
import time
from bisect import bisect_right
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager

import httpx
from flwr.app import Message, Metadata
from flwr.app.error import Error
from flwr.app.message import make_message
from flwr.common.constant import ErrorCode
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid

from fedlora.errors import RunFailed, shown

log = logging.getLogger(__name__)

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

# replies that are asked for at one look, so that a look at many clients stays short
MOST_PULLED = 64


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
        self._pulled_last = ""

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

    def pull(self, ids: Collection[str]) -> dict[str, Message]:
        """The replies that are there, by the id of the message they answer.

        One that cannot be read is given as a reply that has an error. Of many ids, each is
        looked for at one of several calls.
        """
        order = sorted(ids)
        first = bisect_right(order, self._pulled_last)
        replies: dict[str, Message] = {}
        with self._patience():
            # one by one: a Grid that fails to read a reply drops those it has pulled with it
            for message in (order[first:] + order[:first])[:MOST_PULLED]:
                self._pulled_last = message
                replies.update((message, reply) for reply in self._pull(message))
        return replies

    def _pull(self, message: str) -> list[Message]:
        try:
            found = list(self.grid.pull_messages([message]))
            for reply in found:
                # a reply may come without either
                assert reply.has_error() or reply.content is not None
        except httpx.HTTPError:
            raise
        except Exception as e:
            log.warning("the reply to message %s cannot be read", message, exc_info=True)
            return [_unreadable(message, e)]
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


def _unreadable(message: str, error: Exception) -> Message:
    metadata = Metadata(
        run_id=0,
        message_id="",
        src_node_id=0,
        dst_node_id=0,
        reply_to_message_id=message,
        group_id="",
        created_at=time.time(),
        ttl=0.0,
        message_type="system",
    )
    why = f"its reply cannot be read ({type(error).__name__}: {shown(str(error))})"
    return make_message(metadata, error=Error(ErrorCode.UNKNOWN, why))
