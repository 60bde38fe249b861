"""Transfers: how many run at once, and the end of those that stand still."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Transfer:
    """One transfer; `progress` is called with every chunk."""

    def __init__(
        self, cancel: Callable[[], object], owner: str, clock: Callable[[], float]
    ) -> None:
        self.cancel = cancel
        self.owner = owner
        self._clock = clock
        self.began_s = self.moved_s = clock()
        self.bytes = 0

    def progress(self, size_bytes: int = 0) -> None:
        """Something has moved: so many bytes."""
        self.moved_s = self._clock()
        self.bytes += size_bytes


class Transfers:
    """The transfers under way.

    A deadline on progress ends a peer that keeps a place by sending nothing, a least average
    rate one that sends a byte now and then; one that is slow is spared.

    Args:
        most: at once.
        stall_s: a transfer without progress for so long is cancelled.
        most_each: of one owner at once; by default as many as there are.
        slowest: bytes per second that a transfer must reach on average after `stall_s`.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        most: int,
        stall_s: float,
        clock: Callable[[], float] = time.monotonic,
        *,
        most_each: int | None = None,
        slowest: float = 0.0,
    ) -> None:
        self._most = most
        self._most_each = most if most_each is None else most_each
        self._stall_s = stall_s
        self._slowest = slowest
        self._clock = clock
        self._lock = threading.Lock()
        self._active: set[Transfer] = set()
        self._closed = threading.Event()
        self._watchdog = threading.Thread(target=self._watch, name="transfers", daemon=True)

    @contextmanager
    def admit(self, cancel: Callable[[], object], owner: str = "") -> Iterator[Transfer | None]:
        """A place for one transfer while inside, None if all are taken, or all that one may have.

        Args:
            cancel: ends the transfer from another thread.
            owner: whose transfer it is.
        """
        transfer = Transfer(cancel, owner, self._clock)
        with self._lock:
            own = sum(other.owner == owner for other in self._active)
            admitted = len(self._active) < self._most and own < self._most_each
            if admitted:
                self._active.add(transfer)
        try:
            yield transfer if admitted else None
        finally:
            with self._lock:
                self._active.discard(transfer)

    def __len__(self) -> int:
        return len(self._active)

    def sweep(self) -> None:
        """Cancels every transfer that stands still, or as good as that."""
        now = self._clock()
        with self._lock:
            stalled = [
                t
                for t in self._active
                if now - t.moved_s >= self._stall_s
                or t.bytes < self._slowest * (now - t.began_s - self._stall_s)
            ]
        for transfer in stalled:
            transfer.cancel()

    def start(self) -> None:
        """Sweeps from now on, from a thread of its own."""
        self._watchdog.start()

    def stop(self) -> None:
        """Sweeps no more."""
        self._closed.set()

    def _watch(self) -> None:
        while not self._closed.wait(min(1.0, self._stall_s / 4)):
            self.sweep()
