"""Link: what carries work and bytes between the round loop and the clients."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from fedlora.strategies.base import ClientInfo

BUDGET_EXHAUSTED = "BUDGET_EXHAUSTED"
"""Code of a client that may not take part any more: its privacy budget is spent."""


@dataclass(frozen=True)
class Task:
    """Work for one client.

    Attributes:
        client: its name.
        manifest: of the broadcast; its parts are on offer by digest.
        max_bytes: the most bytes its reply's payload may have.
        shares: in secure aggregation, what the other clients have for it.
    """

    client: str
    manifest: bytes
    max_bytes: int
    shares: bytes = b""


@dataclass(frozen=True)
class Reply:
    """What came back from one client, not yet believed.

    Attributes:
        client: the authenticated sender.
        manifest, payload: as received; both empty when the client did not answer.
        bytes_down: bytes the client fetched for this task, its manifest included.
        seconds: when the reply came, counted from the start of the round (virtual seconds
            in a simulation).
        error: why there is no update, if the client said so.
        code: kind of that error: "CLIENT_ERROR", or BUDGET_EXHAUSTED.
    """

    client: str
    manifest: bytes
    payload: bytes
    bytes_down: int
    seconds: float
    error: str = ""
    code: str = "CLIENT_ERROR"


class Link(Protocol):
    """Local, Ray or Flower."""

    def roster(self) -> Sequence[ClientInfo]:
        """The clients that can take part now, sorted by name."""
        ...

    def exchange(
        self, tasks: Sequence[Task], parts: Mapping[str, bytes], deadline_s: float
    ) -> Iterator[Reply]:
        """Hands out the tasks and yields replies as they come, for at most `deadline_s`.

        Args:
            tasks: one per client.
            parts: SHA-256 -> bytes of every part that the manifests name.
            deadline_s: after so many seconds nothing more is yielded.
        """
        ...


class SecureLink(Link, Protocol):
    """A link whose clients take part in secure aggregation.

    A task then has the shares for its client, and the payload of its reply is a masked
    vector; see `fedlora.privacy.secagg`.
    """

    def identities(self) -> Mapping[str, bytes]:
        """Client -> its Ed25519 public key."""
        ...

    def ask(self, step: str, messages: Mapping[str, bytes]) -> Iterator[Reply]:
        """Yields the clients' answers to one message for each, as payloads.

        Args:
            step: "advertise", "share", "sign" or "reveal".
            messages: client -> message.
        """
        ...


class AsyncLink(Protocol):
    """A link that can hold several tasks at once and gives replies back one by one."""

    def roster(self) -> Sequence[ClientInfo]:
        """The clients that can take part now, sorted by name."""
        ...

    def submit(
        self, task: Task, parts: Mapping[str, bytes], deadline_s: float, due: float | None = None
    ) -> float:
        """Hands out one task and says when its reply is due, on the link's clock.

        Args:
            deadline_s: after so many seconds the reply is an empty one.
            due: when it was due before an interruption; None for new work.
        """
        ...

    def next_reply(self) -> Reply:
        """The next reply of a submitted task, empty when the client did not answer in time."""
        ...

    def cancel(self, client: str) -> None:
        """Waits no longer for a client's reply."""
        ...

    def clock(self) -> float:
        """Seconds since the start of the run (virtual ones in a simulation)."""
        ...

    def set_clock(self, seconds: float) -> None:
        """Continues the clock of an interrupted run."""
        ...
