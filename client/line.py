"""Line: calls that wait for their turn, in the order in which they came."""

import threading
from collections import deque
from typing import Generic, Protocol, TypeVar


class Waits(Protocol):
    """What can stand in line."""

    def ahead(self, count: int) -> None:
        """Hears that so many are served before it."""

    def lost(self) -> None:
        """Hears that it will not be served."""


T = TypeVar("T", bound=Waits)


class LineFull(Exception):
    """As many are waiting as may."""


class LineClosed(Exception):
    """Nobody is served any more."""


class Line(Generic[T]):
    """A bounded queue, one of which is served at a time.

    Args:
        most: the most that may wait, without the one that is served.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._waiting: deque[T] = deque()
        self._serving = False
        self._closed = False
        self._changed = threading.Condition()

    @property
    def waiting(self) -> int:
        """How many wait, without the one that is served."""
        with self._changed:
            return len(self._waiting)

    def join(self, call: T) -> None:
        """Stands `call` at the end.

        Raises:
            LineFull: no place is left.
            LineClosed: it is too late.
        """
        with self._changed:
            if self._closed:
                raise LineClosed
            if len(self._waiting) >= self.most:
                raise LineFull
            self._waiting.append(call)
            self._tell()
            self._changed.notify_all()

    def leave(self, call: T) -> None:
        """Takes `call` out, if it still waits."""
        with self._changed:
            if call in self._waiting:
                self._waiting.remove(call)
                self._tell()

    def next(self, timeout_s: float | None) -> T | None:
        """The first in line, which is served until `next` is called again.

        Returns:
            None when nobody came within the time, or the line is closed.
        """
        with self._changed:
            self._serving = False
            self._changed.wait_for(lambda: self._waiting or self._closed, timeout_s)
            if self._closed or not self._waiting:
                return None
            self._serving = True
            call = self._waiting.popleft()
            self._tell()
            return call

    def close(self) -> None:
        """Serves nobody any more, and tells those who wait."""
        with self._changed:
            self._closed = True
            for call in self._waiting:
                call.lost()
            self._waiting.clear()
            self._changed.notify_all()

    def close_if_empty(self) -> bool:
        """Closes it unless somebody waits; says whether it is closed."""
        with self._changed:
            self._closed = self._closed or not self._waiting
            return self._closed

    def _tell(self) -> None:
        for place, call in enumerate(self._waiting):
            call.ahead(place + self._serving)
