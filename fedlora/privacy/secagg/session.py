"""Session: what one attempt at one secure sum is about, fixed before any key is made."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from fedlora.errors import SecureAggregationError
from fedlora.privacy.secagg.layout import Cutter, number, real, text

MAX_CLIENTS = 64
MIN_CLIENTS = 3
MAX_TENSORS = 4096
MAX_ENTRIES = 2**31
MAX_TEXT = 256
TAG = b"fedlora secure aggregation 1"


@dataclass(frozen=True)
class Part:
    """One tensor's place in the vector that is summed.

    Attributes:
        name: of the tensor.
        size: its entries.
        clip: c, the largest absolute value that an entry can have; public.
    """

    name: str
    size: int
    clip: float


@dataclass(frozen=True)
class Session:
    """One attempt at one sum. Every key and signature is bound to its digest.

    Attributes:
        run, round, attempt: of the round's plan.
        work_sha256: of what every client is asked to do; see `work_digest`.
        clients: names of those who are asked, sorted; a client's index is its place here.
        threshold: t, fewest clients whose sum is ever taken; more than half of all.
        bits: masked entries are integers modulo 2 ** bits; 32 or 64.
        parts: tensors in the order of the vector.

    Raises:
        SecureAggregationError: a value out of its bounds.
    """

    run: str
    round: int
    attempt: int
    work_sha256: str
    clients: tuple[str, ...]
    threshold: int
    bits: int
    parts: tuple[Part, ...]

    def __post_init__(self) -> None:
        n = len(self.clients)
        if not MIN_CLIENTS <= n <= MAX_CLIENTS:
            raise SecureAggregationError(
                f"secure aggregation among {n} clients; expected {MIN_CLIENTS} to {MAX_CLIENTS}"
            )
        if list(self.clients) != sorted(set(self.clients)):
            raise SecureAggregationError("the clients of a session are not sorted, or named twice")
        for value in (self.run, self.work_sha256, *self.clients, *(p.name for p in self.parts)):
            if len(value.encode()) > MAX_TEXT:
                raise SecureAggregationError(
                    f"name {value[:40]!r}... has {len(value.encode())} bytes; expected at most "
                    f"{MAX_TEXT}"
                )
        if not n < 2 * self.threshold <= 2 * n:
            raise SecureAggregationError(
                f"threshold {self.threshold} of {n} clients; expected more than half and at most "
                "all of them"
            )
        if self.bits not in (32, 64):
            raise SecureAggregationError(f"integers of {self.bits} bits; expected 32 or 64")
        names = [part.name for part in self.parts]
        if not names or len(names) > MAX_TENSORS or names != sorted(set(names)):
            raise SecureAggregationError(
                f"{len(names)} tensors; expected 1 to {MAX_TENSORS}, sorted, each once"
            )
        if not all(0 <= part.size <= MAX_ENTRIES for part in self.parts) or (
            sum(part.size for part in self.parts) > MAX_ENTRIES
        ):
            raise SecureAggregationError(f"a session of more than {MAX_ENTRIES} entries")
        for part in self.parts:
            if not (math.isfinite(part.clip) and part.clip > 0):
                raise SecureAggregationError(
                    f"tensor {part.name} is clipped to {part.clip:g}; expected a number above 0"
                )

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 of the session; 32 bytes."""
        return hashlib.sha256(TAG + self.encode()).digest()

    def statement(self, kind: str, *pieces: bytes) -> bytes:
        """What is signed, or sets a key apart: the kind, the session and the pieces."""
        return b"".join([TAG, text(kind), self.digest, *(number(len(p), 4) + p for p in pieces)])

    def index(self, client: str) -> int:
        """A client's place in the session.

        Raises:
            SecureAggregationError: it is not in it.
        """
        try:
            return self.clients.index(client)
        except ValueError as e:
            raise SecureAggregationError(
                f"client {client!r} is not in the session of round {self.round}", client
            ) from e

    def encode(self) -> bytes:
        """The session's bytes; equal for equal sessions alone."""
        return b"".join(
            [
                text(self.run),
                number(self.round, 8),
                number(self.attempt, 4),
                text(self.work_sha256),
                number(len(self.clients), 1),
                *map(text, self.clients),
                number(self.threshold, 1),
                number(self.bits, 1),
                number(len(self.parts), 2),
                *(text(p.name) + number(p.size, 4) + real(p.clip) for p in self.parts),
            ]
        )

    @classmethod
    def decode(cls, data: bytes) -> "Session":
        """The session in a message of the server.

        Raises:
            SecureAggregationError: not a session, or one out of its bounds.
        """
        cut = Cutter(data, "session")
        run, round_, attempt = cut.text(MAX_TEXT), cut.number(8), cut.number(4)
        work = cut.text(MAX_TEXT)
        clients = tuple(cut.text(MAX_TEXT) for _ in range(cut.number(1)))
        threshold, bits = cut.number(1), cut.number(1)
        count = cut.number(2)
        parts = tuple(Part(cut.text(MAX_TEXT), cut.number(4), cut.real()) for _ in range(count))
        cut.end()
        return cls(run, round_, attempt, work, clients, threshold, bits, parts)


def threshold_for(clients: int, quorum: int) -> int:
    """The threshold of a sum of at least `quorum` clients: never half of them or fewer."""
    return max(quorum, clients // 2 + 1)


def named(session: Session, indices: Sequence[int]) -> str:
    """Names of clients, as they are told in an error."""
    return ", ".join(session.clients[i] for i in indices) or "none"
