"""Transfers: how many run at once, and the end of those that stand still."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Transfer:
    """One transfer; `progress` is called with every chunk."""

    def __init__(self, cancel: Callable[[], object], clock: Callable[[], float]) -> None:
        self.cancel = cancel
        self._clock = clock
        self.moved_s = clock()

    def progress(self) -> None:
        """Something has moved."""
        self.moved_s = self._clock()


class Transfers:
    """The transfers under way.

    A deadline on progress ends a peer that keeps a place by sending nothing, and spares one
    that is slow.

    Args:
        most: at once.
        stall_s: a transfer without progress for so long is cancelled.
        clock: monotonic seconds.
    """

    def __init__(
        self, most: int, stall_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._most = most
        self._stall_s = stall_s
        self._clock = clock
        self._lock = threading.Lock()
        self._active: set[Transfer] = set()
        self._closed = threading.Event()
        self._watchdog = threading.Thread(target=self._watch, name="transfers", daemon=True)

    @contextmanager
    def admit(self, cancel: Callable[[], object]) -> Iterator[Transfer | None]:
        """A place for one transfer while inside, None if all are taken.

        Args:
            cancel: ends the transfer from another thread.
        """
        transfer = Transfer(cancel, self._clock)
        with self._lock:
            admitted = len(self._active) < self._most
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
        """Cancels every transfer that stands still."""
        now = self._clock()
        with self._lock:
            stalled = [t for t in self._active if now - t.moved_s >= self._stall_s]
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
