"""Posted: one message to a node, under every id that Flower gave it."""

import time
from dataclasses import dataclass, field

# then a message is posted again, and again after twice as long, up to MOST_S. A ClientApp that is killed
# before it has taken its message leaves no trace of it: Flower neither gives the message to the
# next one nor answers with an error
UNHEARD_S = 45.0
MOST_S = 300.0


@dataclass
class Posted:
    """What was posted, and when it is posted next unless something is heard before.

    Whoever takes it twice does it once: a client keeps what it made of an order.

    Attributes:
        ids: Flower's, of every time it was posted; a reply to any of them is the reply.
    """

    ids: list[str] = field(default_factory=list)
    _next: float = 0.0
    _pause: float = field(default_factory=lambda: UNHEARD_S)

    @property
    def due(self) -> bool:
        """It is to be posted now."""
        return time.monotonic() >= self._next

    def add(self, message: str) -> None:
        """It was posted under this id; empty when that failed."""
        if message:
            self.ids.append(message)
            self._next = time.monotonic() + self._pause
            self._pause = min(2.0 * self._pause, MOST_S)

    def drop(self, seconds: float = 0.0) -> None:
        """Its node has lost it: it is posted again, not before so many seconds."""
        self.ids = []
        self._next = time.monotonic() + seconds
