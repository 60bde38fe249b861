"""Real servers of every kind, one connection after the other, on a free local port."""

import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from fedlora.diagnosis import PREFACE

SETTINGS = bytes.fromhex("000000040000000000")

Serve = Callable[[socket.socket], None]


@contextmanager
def server(serve: Serve) -> Iterator[int]:
    """A port on which every connection is given to `serve`."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        closing = threading.Event()

        def loop() -> None:
            while True:
                connection, _ = listener.accept()
                with connection:
                    if closing.is_set():
                        return
                    connection.settimeout(10)
                    try:
                        serve(connection)
                    except OSError:
                        continue

        thread = threading.Thread(target=loop)
        thread.start()
        port = listener.getsockname()[1]
        try:
            yield port
        finally:
            closing.set()
            socket.create_connection(("127.0.0.1", port)).close()
            thread.join()


def http2(connection: socket.socket) -> None:
    """Opens an HTTP/2 connection as gRPC does: speaks first, and closes on a wrong answer."""
    connection.sendall(SETTINGS)
    data = b""
    while PREFACE.startswith(data):
        chunk = connection.recv(4096)
        if not chunk:
            return
        data += chunk


def silent(connection: socket.socket) -> None:
    """Reads until the other side gives up."""
    while connection.recv(4096):
        pass


def http1(connection: socket.socket) -> None:
    """Answers anything as an ordinary web server would."""
    connection.recv(4096)
    connection.sendall(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")


def secured(
    certificate: Path,
    key: Path,
    clients: Path | None,
    inner: Serve = http2,
    *,
    alpn: str = "h2",
    version: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3,
) -> Serve:
    """`inner` over TLS, for clients whose certificate is of the authority `clients`."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.maximum_version = version
    context.load_cert_chain(certificate, key)
    context.set_alpn_protocols([alpn])
    if clients is not None:
        context.load_verify_locations(clients)
        context.verify_mode = ssl.CERT_REQUIRED

    def serve(connection: socket.socket) -> None:
        with context.wrap_socket(connection, server_side=True) as wrapped:
            inner(wrapped)

    return serve
