"""Exchange client: fetches and sends blobs, and goes on where a broken connection left them."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc

from fedlora.client.blobs import DamagedBlob, IncomingBlob, Outgoing
from fedlora.client.patience import Patience
from fedlora.protos.exchange_pb2 import (
    DownloadRequest,
    StatReply,
    StatRequest,
    UploadHeader,
    UploadMessage,
    UploadReply,
)
from fedlora.protos.frames import read_download, upload_chunk
from fedlora.tickets import METADATA_KEY

SERVICE = "/fedlora.v1.DeltaExchange/"
# a link slower than this counts as broken
SLOWEST_BYTES_PER_S = 16 * 1024
OPTIONS = (
    ("grpc.max_receive_message_length", 4 << 20),
    # without these a server that was away for a minute is asked again only after another
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1000),
    ("grpc.max_reconnect_backoff_ms", 2000),
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
)

Metadata = tuple[tuple[str, str], ...]


class ExchangeClient:
    """One client's connection to an exchange.

    Args:
        address: host:port.
        credentials: TLS; None talks in plain text.
        patience_s: a transfer that gets no further for so long is given up.
        options: more gRPC channel options.
        wait: sleeps for the seconds it is given.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        address: str,
        credentials: grpc.ChannelCredentials | None,
        *,
        patience_s: float,
        options: tuple[tuple[str, str | int], ...] = (),
        wait: Callable[[float], object] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._address = address
        self._patience_s = patience_s
        self._wait = wait
        self._clock = clock
        everything = (*OPTIONS, *options)
        self._channel = (
            grpc.insecure_channel(address, everything)
            if credentials is None
            else grpc.secure_channel(address, credentials, everything)
        )
        self._stat = self._channel.unary_unary(
            SERVICE + "Stat", StatRequest.SerializeToString, StatReply.FromString
        )
        self._upload = self._channel.stream_unary(SERVICE + "Upload", None, UploadReply.FromString)
        self._download = self._channel.unary_stream(
            SERVICE + "Download", DownloadRequest.SerializeToString, None
        )

    def close(self) -> None:
        """Ends the connection."""
        self._channel.close()

    def fetch(
        self,
        ticket: str,
        digest: str,
        size_bytes: int | None = None,
        accept: Callable[[int], None] = lambda size_bytes: None,
    ) -> bytes:
        """The blob with this SHA-256, checked.

        Args:
            ticket: for the direction "down".
            size_bytes: what the blob must have, if that is known.
            accept: is asked with the bytes that the server announces, before any is kept; what
                it raises ends the fetch.

        Raises:
            TransferError: it was refused, or could not be had within the patience.
        """
        blob = IncomingBlob(digest, size_bytes, accept)
        patience = self._patience(f"blob {digest[:12]} could not be fetched")
        while not blob.checked:
            before = blob.size
            try:
                self._fetch_rest(ticket, blob)
            except grpc.RpcError as error:
                patience.after(error, moved=blob.size > before)
            except DamagedBlob as error:
                blob = IncomingBlob(digest, size_bytes, accept)
                patience.after_damage(str(error))
        return blob.data()

    def send(self, ticket: str, manifest: bytes, payload: bytes | Path, bytes_down: int = 0) -> int:
        """Sends a reply, unless the server has it; returns how many of its bytes were sent.

        Counted are the bytes given to gRPC, in all tries; some of a try that failed may never
        have left this machine.

        Args:
            ticket: for the direction "up".
            manifest: of the update.
            payload: the bytes, or a file of them.
            bytes_down: what was fetched for this reply, for the server's books.

        Raises:
            TransferError: it was refused, or could not be sent within the patience.
            OSError: the file cannot be read.
        """
        with Outgoing(payload) as source:
            patience = self._patience(f"the reply {source.sha256[:12]} could not be sent")
            sent = offset = 0
            metadata = _metadata(ticket)
            while True:
                try:
                    reply = self._stat(
                        StatRequest(sha256=source.sha256),
                        metadata=metadata,
                        timeout=self._patience_s,
                    )
                    if reply.complete:
                        return sent
                    if reply.size_bytes > offset:
                        patience.renew()
                    offset = reply.size_bytes
                    messages = _Messages(source, manifest, offset, bytes_down)
                    try:
                        self._upload(
                            iter(messages),
                            metadata=metadata,
                            timeout=self._timeout(source.size_bytes),
                        )
                    finally:
                        sent += messages.sent
                    return sent
                except grpc.RpcError as error:
                    if error.code() == grpc.StatusCode.DATA_LOSS:
                        patience.after_damage(error.details())
                    else:
                        patience.after(error)

    def _fetch_rest(self, ticket: str, blob: IncomingBlob) -> None:
        request = DownloadRequest(sha256=blob.sha256, offset_bytes=blob.size)
        call = self._download(
            request, metadata=_metadata(ticket), timeout=self._timeout(blob.announced or 0)
        )
        try:
            for message in call:
                blob.add(*read_download(message))
        finally:
            call.cancel()
        blob.check()

    def _timeout(self, size_bytes: int) -> float:
        return self._patience_s + size_bytes / SLOWEST_BYTES_PER_S

    def _patience(self, what: str) -> Patience:
        return Patience(what, self._address, self._patience_s, self._wait, self._clock)


class _Messages:
    """The messages of one upload; counts the bytes that gRPC took."""

    def __init__(self, source: Outgoing, manifest: bytes, offset: int, bytes_down: int) -> None:
        self.sent = 0
        self._source = source
        self._header = UploadMessage(
            header=UploadHeader(
                sha256=source.sha256,
                size_bytes=source.size_bytes,
                offset_bytes=offset,
                manifest=manifest,
                bytes_down=bytes_down,
            )
        )
        self._offset = offset

    def __iter__(self) -> Iterator[bytes]:
        yield self._header.SerializeToString()
        for chunk in self._source.chunks(self._offset):
            self.sent += len(chunk)
            yield upload_chunk(chunk)


def _metadata(ticket: str) -> Metadata:
    return ((METADATA_KEY, ticket),)
