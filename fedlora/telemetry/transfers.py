"""TransferMetrics: what the exchange moves, holds and refuses."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Gauge

Direction = Literal["up", "down"]


class TransferMetrics:
    """Told by the exchange what it does; safe to call from any thread.

    Args:
        registry: where the figures are registered.
        disk_bytes: bytes that the exchange holds on disk; called at each scrape.
    """

    def __init__(self, registry: CollectorRegistry, disk_bytes: Callable[[], int]) -> None:
        self._active = Gauge(
            "fedlora_exchange_transfers_active",
            "Transfers under way.",
            ("direction",),
            registry=registry,
        )
        moved = Counter(
            "fedlora_exchange_bytes",
            "Bytes of payloads received (up) and sent (down), with what was sent again.",
            ("direction",),
            registry=registry,
        )
        # looked up once: these are counted for every chunk
        self._moved = {direction: moved.labels(direction) for direction in ("up", "down")}
        self._refused = Counter(
            "fedlora_exchange_refused",
            "Calls refused, by gRPC status code.",
            ("reason",),
            registry=registry,
        )
        Gauge("fedlora_exchange_disk_bytes", "Bytes held on disk.", registry=registry).set_function(
            disk_bytes
        )
        for direction in ("up", "down"):
            self._active.labels(direction)

    @contextmanager
    def active(self, direction: Direction) -> Iterator[None]:
        """One more transfer while inside."""
        with self._active.labels(direction).track_inprogress():
            yield

    def moved(self, direction: Direction, size_bytes: int) -> None:
        """A chunk went through."""
        self._moved[direction].inc(size_bytes)

    def refused(self, reason: str) -> None:
        """A call was refused; `reason` is the name of its status code."""
        self._refused.labels(reason).inc()
