"""A TCP proxy that does to connections what networks do to them."""

import random
import socket
import struct
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

WHOLE = 1 << 62
# both ends of a connection that is cut with this option see a reset, not an orderly end
RESET = struct.pack("ii", 1, 0)
PIECE = 1 << 16


@dataclass(frozen=True)
class Fate:
    """What happens to one connection.

    Attributes:
        bytes: that pass, both directions together, before it ends.
        ending: "close", "reset" or "stall" (it stays open and nothing passes any more).
        delay_s: every piece waits so long.
        repeated: so many of the first bytes of the caller are sent twice.
    """

    bytes: int = WHOLE
    ending: str = "close"
    delay_s: float = 0.0
    repeated: int = 0


def cuts(*places: int) -> Iterator[Fate]:
    """Connections that are closed after so many bytes."""
    return iter([Fate(place) for place in places])


def drawn(seed: int, number: int, most_bytes: int) -> Iterator[Fate]:
    """So many connections of every kind but stalled ones, drawn by `seed`."""
    chance = random.Random(seed)
    for _ in range(number):
        kind = chance.choice(("close", "reset", "delay", "repeat"))
        yield Fate(
            chance.randrange(1, most_bytes),
            "reset" if kind == "reset" else "close",
            chance.uniform(0.0, 0.002) if kind == "delay" else 0.0,
            chance.randrange(1, 200) if kind == "repeat" else 0,
        )


class Proxy:
    """Forwards to `port`; each connection in turn meets its fate.

    Args:
        port: of the server.
        fates: of the first connections; later ones are whole.

    Attributes:
        port: where it listens.
        connections: that were opened.
        forwarded: bytes, both directions together.
    """

    def __init__(self, port: int, fates: Iterator[Fate]) -> None:
        self._target = port
        self._fates = fates
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.connections = 0
        self.forwarded = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                inner, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            try:
                outer = socket.create_connection(("127.0.0.1", self._target))
            except OSError:
                inner.close()
                continue
            passing = _Connection(self, inner, outer, next(self._fates, Fate()))
            for up in (True, False):
                threading.Thread(target=passing.pump, args=(up,), daemon=True).start()


class _Connection:
    def __init__(
        self, proxy: Proxy, inner: socket.socket, outer: socket.socket, fate: Fate
    ) -> None:
        self._proxy = proxy
        self._ends = (inner, outer)
        self._fate = fate
        self._left = fate.bytes

    def pump(self, up: bool) -> None:
        source, sink = self._ends if up else reversed(self._ends)
        repeated = self._fate.repeated if up else 0
        try:
            while self._left > 0 and (data := source.recv(min(PIECE, self._left))):
                if self._fate.delay_s:
                    time.sleep(self._fate.delay_s)
                self._left -= len(data)
                self._proxy.forwarded += len(data)
                sink.sendall(data[:repeated] + data)
                repeated = 0
        except OSError:
            pass
        if self._left <= 0 and self._fate.ending == "stall":
            return
        for end in self._ends:
            self._end(end)

    def _end(self, end: socket.socket) -> None:
        try:
            if self._left <= 0 and self._fate.ending == "reset":
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
                end.close()
            else:
                end.shutdown(socket.SHUT_RDWR)
        except OSError:
            return
