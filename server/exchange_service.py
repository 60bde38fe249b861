"""The DeltaExchange service: tickets and identities checked, then bytes moved.

Everything about a caller is checked on its metadata, before the first byte of a body is read.
"""

import io
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import grpc

from fedlora.errors import RunFolderError, TicketError, UploadRefused
from fedlora.protos.exchange_pb2 import (
    DownloadRequest,
    RunEvent,
    StatReply,
    StatRequest,
    UploadHeader,
    UploadReply,
    WatchRequest,
)
from fedlora.protos.frames import download_chunk
from fedlora.server.blob_store import BlobStore
from fedlora.server.identity import peer_identity
from fedlora.server.refusals import refuse, statuses
from fedlora.server.run_events import RunEvents
from fedlora.server.transfers import Transfer, Transfers
from fedlora.server.upload_messages import (
    CHUNK_BYTES,
    check_digest,
    check_header,
    read_chunk,
    read_header,
)
from fedlora.tickets import MAX_BLOB_BYTES, METADATA_KEY, Ticket, check

SERVICE = "fedlora.v1.DeltaExchange"
MAX_WATCHES = 32


class ExchangeService:
    """The four methods.

    Args:
        store: where the bytes are.
        key: of the tickets.
        transfers: places for uploads and downloads.
        events: what a Watch shows.
        require_identity: callers must have a certificate (mutual TLS).
        is_revoked: whether a certificate of this serial number is void.
        draining: set when the server goes down.
        clock: seconds since 1970-01-01 UTC.
    """

    def __init__(
        self,
        store: BlobStore,
        key: bytes,
        *,
        transfers: Transfers,
        events: RunEvents,
        require_identity: bool,
        is_revoked: Callable[[int], bool],
        draining: threading.Event,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._key = key
        self._transfers = transfers
        self._events = events
        self._require_identity = require_identity
        self._is_revoked = is_revoked
        self._draining = draining
        self._clock = clock
        self._watches: set[threading.Event] = set()
        self._lock = threading.Lock()

    def add_to_server(self, server: grpc.Server) -> None:
        """Registers the methods; chunks stay bytes (see fedlora.protos.frames)."""
        handlers = {
            "Stat": grpc.unary_unary_rpc_method_handler(
                self.stat, StatRequest.FromString, StatReply.SerializeToString
            ),
            "Upload": grpc.stream_unary_rpc_method_handler(
                self.upload, None, UploadReply.SerializeToString
            ),
            "Download": grpc.unary_stream_rpc_method_handler(
                self.download, DownloadRequest.FromString, None
            ),
            "Watch": grpc.unary_stream_rpc_method_handler(
                self.watch, WatchRequest.FromString, RunEvent.SerializeToString
            ),
        }
        server.add_registered_method_handlers(SERVICE, handlers)
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))

    def stat(self, request: StatRequest, context: grpc.ServicerContext) -> StatReply:
        """How much of a blob is here."""
        ticket = self._ticket(context)
        check_digest(request.sha256, context)
        if ticket.direction == "down":
            with self._offered(ticket, request.sha256, context) as file:
                size = os.fstat(file.fileno()).st_size
            return StatReply(size_bytes=size, complete=True)
        with statuses(context):
            size, complete = self._store.held(ticket, request.sha256)
        return StatReply(size_bytes=size, complete=complete)

    def upload(self, messages: Iterator[bytes], context: grpc.ServicerContext) -> UploadReply:
        """One client's reply, from where it broke off."""
        ticket = self._ticket(context, "up")
        with self._place(ticket, context) as transfer:
            header = read_header(messages, context)
            check_header(header, ticket, context)
            with statuses(context):
                receipt = self._store.receipt(ticket)
                if receipt is None:
                    self._receive(ticket, header, messages, transfer, context)
                elif receipt.sha256 != header.sha256:
                    raise UploadRefused("taken", f"the client has replied with {receipt.sha256}")
        return UploadReply(size_bytes=header.size_bytes)

    def download(self, request: DownloadRequest, context: grpc.ServicerContext) -> Iterator[bytes]:
        """A blob on offer, from an offset."""
        ticket = self._ticket(context, "down")
        check_digest(request.sha256, context)
        with (
            self._place(ticket, context) as transfer,
            self._offered(ticket, request.sha256, context) as file,
        ):
            size = os.fstat(file.fileno()).st_size
            if size > ticket.max_bytes:
                refuse(
                    context,
                    grpc.StatusCode.PERMISSION_DENIED,
                    f"the blob has {size} bytes; the ticket allows {ticket.max_bytes}",
                )
            if request.offset_bytes > size:
                refuse(
                    context,
                    grpc.StatusCode.FAILED_PRECONDITION,
                    f"offset {request.offset_bytes} is beyond the {size} bytes of the blob",
                )
            file.seek(request.offset_bytes)
            yield download_chunk(file.read(CHUNK_BYTES), size)
            while chunk := file.read(CHUNK_BYTES):
                transfer.progress(len(chunk))
                yield download_chunk(chunk)

    def watch(self, request: WatchRequest, context: grpc.ServicerContext) -> Iterator[RunEvent]:
        """The events of a run, live."""
        self._check_role(context, "operator")
        stop = threading.Event()
        with self._lock:
            open_watches = len(self._watches)
            if open_watches < MAX_WATCHES and not self._draining.is_set():
                self._watches.add(stop)
        if stop not in self._watches:
            refuse(
                context,
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                f"{open_watches} watches are open; try again",
            )
        try:
            if not context.add_callback(stop.set):
                return
            for event in self._events.follow(request.run, request.skip, stop):
                yield RunEvent(number=event.number, json=event.json, run=event.run)
            if self._draining.is_set():
                refuse(context, grpc.StatusCode.UNAVAILABLE, "the server is draining; try again")
        except RunFolderError as e:
            refuse(context, grpc.StatusCode.NOT_FOUND, str(e))
        finally:
            with self._lock:
                self._watches.discard(stop)

    @property
    def watches(self) -> int:
        """Open watches."""
        return len(self._watches)

    def end_watches(self) -> None:
        """Ends all watches; none begins while the server drains."""
        with self._lock:
            for stop in self._watches:
                stop.set()

    def _receive(
        self,
        ticket: Ticket,
        header: UploadHeader,
        messages: Iterator[bytes],
        transfer: Transfer,
        context: grpc.ServicerContext,
    ) -> None:
        with self._store.begin_upload(
            ticket,
            header.sha256,
            header.size_bytes,
            header.offset_bytes,
            header.manifest,
            min(header.bytes_down, MAX_BLOB_BYTES),
        ) as upload:
            transfer.progress()
            for message in messages:
                chunk = read_chunk(message, context)
                upload.append(chunk)
                transfer.progress(len(chunk))
            upload.finish()

    def _ticket(
        self, context: grpc.ServicerContext, direction: Literal["up", "down"] | None = None
    ) -> Ticket:
        texts = [v for k, v in context.invocation_metadata() if k == METADATA_KEY]
        if len(texts) != 1:
            refuse(
                context,
                grpc.StatusCode.UNAUTHENTICATED,
                f"{len(texts)} tickets in the metadata key {METADATA_KEY}; expected one",
            )
        try:
            ticket = check(self._key, str(texts[0]), self._clock())
        except TicketError as e:
            refuse(context, grpc.StatusCode.UNAUTHENTICATED, str(e))
        name = self._check_role(context, "client")
        if name is not None and name != ticket.client:
            refuse(
                context,
                grpc.StatusCode.PERMISSION_DENIED,
                f"the ticket is {ticket.client!r}'s, the certificate {name!r}'s",
            )
        if direction is not None and ticket.direction != direction:
            refuse(
                context,
                grpc.StatusCode.PERMISSION_DENIED,
                f"the ticket is for the direction {ticket.direction}, not {direction}",
            )
        return ticket

    def _check_role(self, context: grpc.ServicerContext, role: str) -> str | None:
        """The name in the caller's certificate, None where none is required."""
        if not self._require_identity:
            return None
        identity = peer_identity(context)
        if identity is None:
            refuse(
                context,
                grpc.StatusCode.UNAUTHENTICATED,
                "a certificate with one common name and one organizational unit is required",
            )
        if self._is_revoked(identity.serial):
            refuse(
                context,
                grpc.StatusCode.PERMISSION_DENIED,
                f"the certificate of {identity.name!r} (serial {identity.serial}) is revoked",
            )
        if identity.role != role:
            refuse(
                context,
                grpc.StatusCode.PERMISSION_DENIED,
                f"the certificate of {identity.name!r} has the role {identity.role!r}; "
                f"expected {role!r}",
            )
        return identity.name

    @contextmanager
    def _place(self, ticket: Ticket, context: grpc.ServicerContext) -> Iterator[Transfer]:
        if self._draining.is_set():
            refuse(context, grpc.StatusCode.UNAVAILABLE, "the server is draining; try again")
        with self._transfers.admit(context.cancel, ticket.client) as transfer:
            if transfer is None:
                refuse(
                    context,
                    grpc.StatusCode.RESOURCE_EXHAUSTED,
                    "too many transfers are under way; try again",
                )
            yield transfer

    def _offered(self, ticket: Ticket, digest: str, context: grpc.ServicerContext) -> io.FileIO:
        path = self._store.offered(ticket.run, digest)
        try:
            # it may be withdrawn at any moment; what is open stays readable
            return io.FileIO(path or "")
        except FileNotFoundError:
            refuse(
                context,
                grpc.StatusCode.NOT_FOUND,
                f"no blob {digest} is on offer in run {ticket.run}",
            )
