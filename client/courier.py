"""Courier: moves the bytes of one order, over the exchange or along with the call."""

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from fedlora.client.order import Order
from fedlora.client.outbox import Kept
from fedlora.client.parts import Parts
from fedlora.client.policy import Policy
from fedlora.errors import TransferError


class Transfer(Protocol):
    """An open connection to an exchange."""

    def fetch(
        self,
        ticket: str,
        digest: str,
        size_bytes: int | None = None,
        accept: Callable[[int], None] = ...,
    ) -> bytes:
        """The blob with this digest, if `accept` takes its size; raises TransferError."""
        ...

    def send(self, ticket: str, manifest: bytes, payload: bytes | Path, bytes_down: int = 0) -> int:
        """Sends an update and says how many bytes went; raises TransferError."""
        ...


# HOST:PORT -> a connection that ends with the context
Connect = Callable[[str], AbstractContextManager[Transfer]]


class Courier:
    """Fetches parts that are not here yet, and sends the update; use as a context manager.

    Args:
        order: says where to and with which tickets.
        parts: what was fetched in earlier rounds.
        connect: opens the exchange, when the first byte has to move.
        policy: how many bytes this site permits.

    Attributes:
        down, up: bytes that went over the exchange.
    """

    def __init__(self, order: Order, parts: Parts, connect: Connect, policy: Policy) -> None:
        self.order = order
        self.parts = parts
        self.connect = connect
        self.policy = policy
        self.down = self.up = 0
        self._stack = ExitStack()
        self._exchange: Transfer | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    def fetch(self, digest: str) -> bytes:
        """A part of the order's broadcast.

        Raises:
            TransferError: it cannot be had.
            PolicyError: these are more bytes than the site permits.
            StorageError: the disk refused.
        """
        if not self.order.exchange:
            if digest not in self.order.parts:
                raise TransferError(f"part {digest[:12]} of the broadcast did not come along")
            return self.order.parts[digest]
        data = self.parts.find(digest)
        if data is None:
            data = self._open().fetch(self.order.download_ticket, digest, accept=self._accept)
            self.down += len(data)
            self.parts.keep(digest, data)
        return data

    def send(self, kept: Kept) -> bytes | None:
        """Sends an update; gives its payload when it has to ride in the call's answer.

        Raises:
            TransferError: it was refused, or could not be sent.
            PolicyError: these are more bytes than the site permits.
        """
        self.policy.check_bytes(up=kept.payload.stat().st_size)
        if not self.order.exchange:
            return kept.payload.read_bytes()
        self.up = self._open().send(
            self.order.upload_ticket, kept.manifest, kept.payload, self.down
        )
        return None

    def _accept(self, size_bytes: int) -> None:
        self.policy.check_bytes(down=self.down + size_bytes)

    def _open(self) -> Transfer:
        if self._exchange is None:
            self._exchange = self._stack.enter_context(self.connect(self.order.exchange))
        return self._exchange
