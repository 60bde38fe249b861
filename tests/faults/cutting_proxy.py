"""A TCP proxy that cuts connections after so many bytes."""

import socket
import threading
from collections.abc import Iterator


class CuttingProxy:
    """Forwards to `port`; each connection in turn is cut when its bytes are used up.

    Args:
        port: of the server.
        cuts: bytes (both directions together) of the first connections; later ones are whole.
    """

    def __init__(self, port: int, cuts: Iterator[int]) -> None:
        self._target = port
        self._cuts = cuts
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
            outer = socket.create_connection(("127.0.0.1", self._target))
            left = [next(self._cuts, 1 << 62)]
            for one, other in ((inner, outer), (outer, inner)):
                threading.Thread(target=self._pump, args=(one, other, left), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, left: list[int]) -> None:
        try:
            while left[0] > 0 and (data := source.recv(1 << 16)):
                left[0] -= len(data)
                self.forwarded += len(data)
                sink.sendall(data)
        except OSError:
            pass
        for end in (source, sink):
            try:
                end.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue
