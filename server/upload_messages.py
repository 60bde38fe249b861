"""The messages of an upload: in order, and within the bounds that exchange.proto names."""

from collections.abc import Iterator

import grpc
from google.protobuf.message import DecodeError

from fedlora.protos.exchange_pb2 import UploadHeader, UploadMessage
from fedlora.protos.frames import read_upload
from fedlora.server.receipts import DIGEST
from fedlora.server.refusals import refuse
from fedlora.tickets import Ticket

CHUNK_BYTES = 1 << 20
MAX_MANIFEST_BYTES = 64 * 1024


def read_header(messages: Iterator[bytes], context: grpc.ServicerContext) -> UploadHeader:
    """The first message; refuses the call if it is no header."""
    message = next(messages, None)
    if message is None:
        refuse(context, grpc.StatusCode.INVALID_ARGUMENT, "no header came")
    parsed = _parsed(message, context)
    if isinstance(parsed, memoryview) or parsed.WhichOneof("content") != "header":
        refuse(context, grpc.StatusCode.INVALID_ARGUMENT, "the first message is not a header")
    return parsed.header


def check_header(header: UploadHeader, ticket: Ticket, context: grpc.ServicerContext) -> None:
    """Refuses the call if the header is out of bounds, or beyond what the ticket allows."""
    check_digest(header.sha256, context)
    if header.size_bytes > ticket.max_bytes:
        refuse(
            context,
            grpc.StatusCode.PERMISSION_DENIED,
            f"{header.size_bytes} bytes announced; the ticket allows {ticket.max_bytes}",
        )
    if len(header.manifest) > MAX_MANIFEST_BYTES:
        refuse(
            context,
            grpc.StatusCode.INVALID_ARGUMENT,
            f"the manifest has {len(header.manifest)} bytes; the limit is {MAX_MANIFEST_BYTES}",
        )


def read_chunk(message: bytes, context: grpc.ServicerContext) -> bytes | memoryview:
    """The chunk in a message; refuses the call if there is none or it is too large."""
    parsed = _parsed(message, context)
    if not isinstance(parsed, memoryview):
        if parsed.WhichOneof("content") != "chunk":
            refuse(context, grpc.StatusCode.INVALID_ARGUMENT, "a message is not a chunk")
        parsed = memoryview(parsed.chunk)
    if len(parsed) > CHUNK_BYTES:
        refuse(
            context,
            grpc.StatusCode.INVALID_ARGUMENT,
            f"a chunk has {len(parsed)} bytes; the limit is {CHUNK_BYTES}",
        )
    return parsed


def _parsed(message: bytes, context: grpc.ServicerContext) -> memoryview | UploadMessage:
    try:
        return read_upload(message)
    except DecodeError:
        refuse(context, grpc.StatusCode.INVALID_ARGUMENT, "not an UploadMessage")


def check_digest(digest: str, context: grpc.ServicerContext) -> None:
    """Refuses the call if `digest` is not a SHA-256 in hexadecimal."""
    if not DIGEST.fullmatch(digest):
        refuse(
            context,
            grpc.StatusCode.INVALID_ARGUMENT,
            f"sha256 is {digest[:80]!r}; expected 64 lower-case hexadecimal digits",
        )
