"""Offers: what one run puts on the exchange, the tickets for it, and what comes back."""

import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from fedlora.messages import Broadcast
from fedlora.server.blob_store import BlobStore
from fedlora.server.link import Task
from fedlora.tickets import Ticket, mint

# a reply that is under way when the round closes may still end, so that its client is told
# that it was late rather than that its ticket expired
GRACE_S = 5.0


@dataclass(frozen=True)
class ReceivedBytes:
    """One client's update as it came in.

    Attributes:
        bytes_down: bytes of parts that the client says it fetched.
    """

    manifest: bytes
    payload: bytes
    bytes_down: int


class Offers:
    """The exchange as a run sees it: the same folder that the exchange serves from.

    Args:
        store: the exchange's blobs.
        key: signs tickets.
        run: lineage id.
        address: HOST:PORT where clients reach the exchange; an empty host is the one where
            they reach Flower.
    """

    def __init__(self, store: BlobStore, key: bytes, run: str, address: str) -> None:
        self.store = store
        self.key = key
        self.run = run
        self.address = address
        self._at = (0, 0)
        self._sizes: dict[str, int] = {}

    def open(self, number: int, attempt: int, parts: Mapping[str, bytes]) -> None:
        """Offers the parts of an attempt at a round, and clears what earlier rounds left.

        Raises:
            StorageError: the disk refused.
        """
        self._at = (number, attempt)
        self.store.reopen(self.run, number)
        self._sizes = {digest: len(data) for digest, data in parts.items()}
        for data in parts.values():
            self.store.offer(self.run, data)
        self.store.withdraw(self.run, keep=parts)
        if number > 1:
            self.store.forget_round(self.run, number - 1)

    def received(self, clients: Collection[str]) -> Iterator[tuple[str, ReceivedBytes]]:
        """The updates of these clients that are whole, for the round that is open.

        Each is read when it is asked for, so that one at a time is in memory.
        """
        found = self.store.received(self.run, *self._at)
        for client in sorted(found.keys() & set(clients)):
            receipt = found[client]
            payload = self.store.payload(self.run, *self._at, receipt)
            yield client, ReceivedBytes(receipt.manifest, payload, receipt.bytes_down)

    def tickets(self, task: Task, broadcast: Broadcast, node: int, left_s: float) -> dict[str, str]:
        """What a client needs to fetch its parts and to send its update."""
        number, attempt = self._at
        largest = max((self._sizes[digest] for digest in broadcast.parts.values()), default=0)
        expires = time.time() + left_s + GRACE_S

        def ticket(direction: Literal["up", "down"], most: int) -> str:
            return mint(
                self.key,
                Ticket(
                    run=self.run,
                    round=number,
                    attempt=attempt,
                    client=task.client,
                    node=node,
                    direction=direction,
                    max_bytes=most,
                    expires_s=expires,
                ),
            )

        return {
            "exchange": self.address,
            "download_ticket": ticket("down", largest),
            "upload_ticket": ticket("up", task.max_bytes),
        }
