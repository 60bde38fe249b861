"""Link: what carries work and bytes between the round loop and the clients."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from fedlora.strategies.base import ClientInfo


@dataclass(frozen=True)
class Task:
    """Work for one client: a broadcast manifest; its parts are on offer by digest."""

    client: str
    manifest: bytes


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
    """

    client: str
    manifest: bytes
    payload: bytes
    bytes_down: int
    seconds: float
    error: str = ""


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
