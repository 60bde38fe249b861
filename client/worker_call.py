"""A call to the resident worker over its socket, by whoever has a message for it."""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import grpc

from fedlora.protos.worker_pb2 import (
    Done,
    PartChunk,
    Refused,
    StatusReply,
    StatusRequest,
    WorkHeader,
    WorkMessage,
)
from fedlora.protos.worker_pb2_grpc import WorkerStub

CHUNK_BYTES = 1 << 20
# a worker that died so often over one message will not survive it
MOST_TRIES = 3
OPTIONS = (
    # a worker that is restarted is found soon
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 500),
    ("grpc.max_receive_message_length", 4 << 20),
)
ENDED = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)


class WorkerGone(Exception):
    """The worker does not answer."""


@dataclass(frozen=True)
class Worked:
    """What a worker answered.

    Attributes:
        done: what it did; empty when it refused.
        payload: of the update, when it rides in the call.
        refused: why it did not.
    """

    done: Done
    payload: bytes
    refused: Refused | None = None


class WorkerCall:
    """A connection to a worker; use as a context manager.

    Args:
        socket: where the worker listens.
        connect_s: it may take so long to come up.
        start: starts it if it does not answer, and is called again when it has ended.
    """

    def __init__(
        self, socket: Path, connect_s: float, start: Callable[[], None] | None = None
    ) -> None:
        self.socket = socket
        self.connect_s = connect_s
        self.start = start

    def __enter__(self) -> Self:
        self._channel = grpc.insecure_channel(f"unix:{self.socket.absolute()}", OPTIONS)
        self.stub = WorkerStub(self._channel)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._channel.close()

    def status(self, within_s: float) -> StatusReply:
        """What the worker is and does.

        Raises:
            WorkerGone: it does not answer in time.
        """
        ends = time.monotonic() + within_s
        self._connect(ends)
        try:
            left = max(0.1, ends - time.monotonic())
            reply: StatusReply = self.stub.Status(StatusRequest(), timeout=left)
        except grpc.RpcError as e:
            raise WorkerGone(f"the worker at {self.socket} does not answer: {e.details()}") from e
        return reply

    def work(self, header: WorkHeader, parts: Mapping[str, bytes], within_s: float) -> Worked:
        """Has the worker do a client's part of a round.

        A worker that ends on the way is asked again when it is back: it goes on from what it
        has on disk.

        Args:
            parts: digest -> bytes of those that ride along.
            within_s: the answer is waited for so long.

        Raises:
            WorkerGone: there is no answer in time, or the call is not valid.
        """
        ends = time.monotonic() + within_s
        last = ""
        for _ in range(MOST_TRIES):
            self._connect(ends)
            try:
                return self._work(header, parts, ends)
            except grpc.RpcError as e:
                last = f"{e.code().name}: {e.details()}"
                if e.code() not in ENDED or time.monotonic() >= ends:
                    break
        raise WorkerGone(f"the worker at {self.socket} did not do its work: {last}")

    def _work(self, header: WorkHeader, parts: Mapping[str, bytes], ends: float) -> Worked:
        left = max(0.1, ends - time.monotonic())
        payload: list[bytes] = []
        for event in self.stub.Work(_messages(header, parts), timeout=left):
            kind = event.WhichOneof("content")
            if kind == "payload":
                payload.append(event.payload)
            elif kind == "refused":
                return Worked(Done(), b"", event.refused)
            elif kind == "done":
                return Worked(event.done, b"".join(payload))
        raise WorkerGone(f"the worker at {self.socket} ended the call without an answer")

    def _connect(self, ends: float) -> None:
        if self.start is not None:
            self.start()
        wait = max(0.1, min(self.connect_s, ends - time.monotonic()))
        try:
            grpc.channel_ready_future(self._channel).result(timeout=wait)
        except grpc.FutureTimeoutError as e:
            raise WorkerGone(
                f"no worker answers at {self.socket} within {wait:.0f} s; see the log of the "
                "client, and start it again with: fedlora client"
            ) from e


def complete_address(exchange: str, host: str) -> str:
    """HOST:PORT of an exchange; `host` stands in when the server names a port only."""
    return f"{host}{exchange}" if exchange.startswith(":") else exchange


def _messages(header: WorkHeader, parts: Mapping[str, bytes]) -> Iterator[WorkMessage]:
    yield WorkMessage(header=header)
    for digest, data in parts.items():
        for start in range(0, len(data), CHUNK_BYTES):
            chunk = PartChunk(sha256=digest, chunk=data[start : start + CHUNK_BYTES])
            yield WorkMessage(part=chunk)
