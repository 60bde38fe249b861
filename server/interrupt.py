"""Ctrl-C that never cuts a commit in half."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_shielded = 0
_pending = False


@contextmanager
def shielded() -> Iterator[None]:
    """Inside, Ctrl-C is remembered and raised as KeyboardInterrupt at the end.

    Outside the main thread, where signals do not arrive, it does nothing.
    """
    global _shielded, _pending
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGINT, _remember)
    _shielded += 1
    try:
        yield
    finally:
        _shielded -= 1
        signal.signal(signal.SIGINT, previous)
        if _pending and not _shielded:
            _pending = False
            raise KeyboardInterrupt


def _remember(number: int, frame: FrameType | None) -> None:
    global _pending
    _pending = True
