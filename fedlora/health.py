"""HealthServer: how a supervisor and its processes are, and their figures, over HTTP.

    /health     200 while every process runs, else 503; JSON with the parts
    /ready      200 when work can be taken, else 503; the same JSON
    /metrics    figures in Prometheus' text format

Nothing is asked of the caller and nothing can be changed. A request has a bound on its bytes,
its time and the number of its kind, so that a hostile peer costs little.
"""

import json
import logging
import socket
import socketserver
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from http import HTTPStatus
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from fedlora.errors import ConfigError

log = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"
MAX_REQUEST_BYTES = 8192
MAX_CONNECTIONS = 16
# seconds for a whole request, however slowly it trickles in
REQUEST_S = 5.0
STOP_POLL_S = 0.1

JSON = "application/json"
TEXT = "text/plain; charset=utf-8"
GET_ONLY = "only GET is answered\n"


@dataclass(frozen=True)
class Part:
    """One process of a supervisor.

    Attributes:
        name: of the process.
        is_alive: it runs now.
        starts: how often it was started.
        since: when it was last started, seconds since 1970-01-01 UTC; None if never.
    """

    name: str
    is_alive: bool
    starts: int
    since: float | None = None


@dataclass(frozen=True)
class Health:
    """How a supervisor and its processes are.

    Attributes:
        parts: its processes.
        is_ready: work can be taken, e.g. the client has joined its server.
        detail: for people, e.g. what it waits for.
    """

    parts: tuple[Part, ...]
    is_ready: bool
    detail: str = ""

    @property
    def is_healthy(self) -> bool:
        """Every process runs."""
        return all(part.is_alive for part in self.parts)

    def to_json(self) -> dict[str, Any]:
        """As /health shows it; times in UTC (RFC 3339)."""
        parts = [
            {
                "name": part.name,
                "alive": part.is_alive,
                "starts": part.starts,
                "since": None if part.since is None else _time(part.since),
            }
            for part in self.parts
        ]
        found: dict[str, Any] = {"healthy": self.is_healthy, "ready": self.is_ready}
        return {**found, "detail": self.detail, "parts": parts}


class HealthServer:
    """Answers on a thread of its own between `start` and `stop`.

    Args:
        address: HOST:PORT; without a host the loopback one, with port 0 a free port.
        status: called at each request, from any thread.
        registry: the figures; None leaves /metrics out.
        option: names the address in messages.
        request_s: seconds for a whole request.

    Raises:
        ConfigError: no such address.
    """

    def __init__(
        self,
        address: str,
        status: Callable[[], Health],
        registry: CollectorRegistry | None = None,
        *,
        option: str = "--health",
        request_s: float = REQUEST_S,
    ) -> None:
        self._host, self._port = _parse(address, option)
        self._status = status
        self._registry = registry
        self._option = option
        self._request_s = request_s
        self._server: _Server | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> int:
        """Listens from now on; returns the port.

        Raises:
            ConfigError: the address cannot be listened on.
        """
        family = socket.AF_INET6 if ":" in self._host else socket.AF_INET
        try:
            self._server = _Server(family, (self._host, self._port), self.answer, self._request_s)
        except OSError as e:
            raise ConfigError(
                f"{self._option}: port {self._port} of {self._host} cannot be listened on "
                f"({e.strerror or e}); stop what uses it, or choose another with {self._option}"
            ) from e
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(STOP_POLL_S,), name="health", daemon=True
        )
        self._thread.start()
        return int(self._server.server_address[1])

    def stop(self) -> None:
        """Listens no more and cuts off who is still there."""
        if self._server is None or self._thread is None:
            return
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
        self._server = self._thread = None

    def answer(self, path: str) -> tuple[HTTPStatus, str, bytes]:
        """Status, content type and body for a path; never raises."""
        try:
            if path == "/metrics" and self._registry is not None:
                figures = bytes(generate_latest(self._registry))
                return HTTPStatus.OK, CONTENT_TYPE_LATEST, figures
            if path in ("/health", "/ready"):
                found = self._status()
                good = found.is_healthy if path == "/health" else found.is_ready
                status = HTTPStatus.OK if good else HTTPStatus.SERVICE_UNAVAILABLE
                return status, JSON, json.dumps(found.to_json()).encode() + b"\n"
        except Exception:  # a figure that cannot be had must not end the thread
            log.exception("%s cannot be answered", path)
            why = b"the log says why\n"
            return HTTPStatus.SERVICE_UNAVAILABLE, TEXT, why
        return HTTPStatus.NOT_FOUND, TEXT, b"there are /health, /ready and /metrics\n"


class _Server(socketserver.ThreadingTCPServer):
    """One thread per connection, for as many as there are places."""

    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 2 * MAX_CONNECTIONS

    def __init__(
        self,
        family: int,
        address: tuple[str, int],
        answer: Callable[[str], tuple[HTTPStatus, str, bytes]],
        request_s: float,
    ) -> None:
        self.address_family = family
        self.answer = answer
        self.request_s = request_s
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        super().__init__(address, _Request)

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """A place is free; otherwise the connection is closed unread."""
        with self._lock:
            if len(self._open) >= MAX_CONNECTIONS:
                return False
            self._open.add(request)
        return True

    def shutdown_request(self, request: Any) -> None:
        """Frees the place of a connection and closes it."""
        with self._lock:
            self._open.discard(request)
        super().shutdown_request(request)

    def server_close(self) -> None:
        """Closes the port and every connection."""
        super().server_close()
        with self._lock:
            left = list(self._open)
        for request in left:
            try:
                request.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A peer that went away or was too slow is no event."""
        log.debug("a health request broke off", exc_info=True)


class _Request(socketserver.BaseRequestHandler):
    """One request, answered and closed (RFC 9112, section 9.6)."""

    server: _Server

    def handle(self) -> None:
        ends = time.monotonic() + self.server.request_s
        head = self._head(ends)
        line = head.split(b"\r\n", 1)[0].split(b" ")
        if not head.endswith(b"\r\n\r\n"):
            if len(head) < MAX_REQUEST_BYTES:
                return
            found = HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, TEXT, b"the request is too long\n"
        elif len(line) != 3 or not line[2].startswith(b"HTTP/1."):
            found = HTTPStatus.BAD_REQUEST, TEXT, b"this is no HTTP/1 request\n"
        elif line[0] != b"GET":
            found = HTTPStatus.METHOD_NOT_ALLOWED, TEXT, GET_ONLY.encode()
        else:
            path = line[1].split(b"?", 1)[0].decode("ascii", "replace")
            found = self.server.answer(path)
        self._send(ends, *found)

    def _head(self, ends: float) -> bytes:
        """The request up to its empty line, or as much of it as there may be."""
        head = b""
        while len(head) < MAX_REQUEST_BYTES:
            data = self._receive(ends, MAX_REQUEST_BYTES - len(head))
            if not data:
                break
            head += data
            if (end := head.find(b"\r\n\r\n")) >= 0:
                return head[: end + 4]
        return head

    def _send(self, ends: float, status: HTTPStatus, kind: str, body: bytes) -> None:
        head = (
            f"HTTP/1.1 {status.value} {status.phrase}\r\nContent-Type: {kind}\r\n"
            f"Content-Length: {len(body)}\r\nCache-Control: no-store\r\nConnection: close\r\n"
        )
        if status is HTTPStatus.METHOD_NOT_ALLOWED:
            head += "Allow: GET\r\n"
        self.request.settimeout(max(1.0, ends - time.monotonic()))
        self.request.sendall(head.encode() + b"\r\n" + body)
        # closing with bytes unread would reset the connection before the answer is read
        self.request.shutdown(socket.SHUT_WR)
        left = 8 * MAX_REQUEST_BYTES
        while left > 0 and (data := self._receive(ends, MAX_REQUEST_BYTES)):
            left -= len(data)

    def _receive(self, ends: float, most: int) -> bytes:
        left_s = ends - time.monotonic()
        if left_s <= 0:
            raise TimeoutError
        self.request.settimeout(left_s)
        return bytes(self.request.recv(most))


def _parse(address: str, option: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    if not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise ConfigError(
            f"{option} {address!r} is no address; expected HOST:PORT, e.g. {LOOPBACK}:9464"
        )
    return host.strip("[]") or LOOPBACK, int(port)


def _time(seconds: float) -> str:
    moment = datetime.fromtimestamp(seconds, UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")
