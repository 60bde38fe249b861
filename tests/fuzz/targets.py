"""Fuzz targets: each takes any bytes, and raises only if a promise about peers' bytes is broken.

Seeds are honest inputs, so that a fuzzer starts behind the first check.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from google.protobuf.message import DecodeError

from fedlora.errors import AdapterError, StorageError, TicketError, UpdateRejected
from fedlora.protos.exchange_pb2 import UploadMessage
from fedlora.protos.frames import read_upload
from fedlora.server.admission import Limits, admit
from fedlora.server.receipts import Receipt, decode_receipt, encode_receipt
from fedlora.storage import sealed, unsealed
from fedlora.tickets import Ticket, check, mint
from fedlora.wire import decode_broadcast, decode_tensors, decode_update_manifest, encode_tensors
from tests.server.cases import encoded, expectation, honest

KEY = bytes(range(32))
LIMITS = Limits(max_update_norm=100.0, max_examples=1e7)
SPLIT = b"\xff--\xff"


@dataclass(frozen=True)
class Target:
    """What runs, and inputs that it accepts."""

    run: Callable[[bytes], None]
    seeds: tuple[bytes, ...]


def ticket(data: bytes) -> None:
    """A text that the key did not sign is never honoured."""
    text = data.decode("utf-8", "surrogateescape")
    try:
        found = check(KEY, text, 0.0)
    except TicketError:
        return
    assert mint(KEY, found) == text


def signed_ticket(data: bytes) -> None:
    """Whatever fields a holder of the key signs, they are a ticket or are refused."""
    from fedlora.tickets import _signed

    try:
        check(KEY, _signed(KEY, data), 0.0)
    except TicketError:
        return


def receipt(data: bytes) -> None:
    """A receipt reads back as it was written."""
    try:
        found = decode_receipt(sealed(data))
    except StorageError:
        return
    assert decode_receipt(encode_receipt(found)) == found


def upload_message(data: bytes) -> None:
    """Framing by hand takes and refuses what protobuf does, with the same meaning."""
    try:
        expected = UploadMessage.FromString(data)
    except DecodeError:
        expected = None
    try:
        found = read_upload(data)
    except DecodeError:
        found = None
    if isinstance(found, memoryview):
        assert expected is not None
        assert bytes(found) == expected.chunk
    else:
        assert found == expected


def tensors(data: bytes) -> None:
    """Only the canonical file passes."""
    try:
        found = decode_tensors(data, _expected().shapes)
    except AdapterError:
        return
    assert encode_tensors(found) == data


def update_manifest(data: bytes) -> None:
    """A manifest is read or refused."""
    try:
        decode_update_manifest(data)
    except AdapterError:
        return


def broadcast(data: bytes) -> None:
    """A broadcast's manifest is read or refused."""
    try:
        decode_broadcast(data)
    except AdapterError:
        return


def admission(data: bytes) -> None:
    """What is admitted is finite and within the limits."""
    manifest, _, payload = data.partition(SPLIT)
    try:
        found = admit(manifest, payload, _expected(), LIMITS)
    except UpdateRejected:
        return
    squares = sum(float((t.double() ** 2).sum()) for t in found.delta.tensors.values())
    assert squares <= 100.0**2
    assert 0 < found.weight <= 1e7


@cache
def _expected():
    return expectation()


def _honest() -> tuple[bytes, bytes]:
    return encoded(honest(_expected()))


def targets() -> dict[str, Target]:
    """All targets by name."""
    signed = mint(KEY, Ticket("run", 1, 0, "ann", 7, "up", 100, 5.0)).encode()
    fields = b'{"attempt":0,"client":"a","direction":"up","expires_s":5,"max_bytes":1,"node":1,'
    whole = unsealed(encode_receipt(Receipt("ann", 7, "0" * 64, 10, b"{}")))
    manifest, payload = _honest()
    return {
        "ticket": Target(ticket, (signed,)),
        "signed-ticket": Target(signed_ticket, (fields + b'"round":1,"run":"r"}',)),
        "receipt": Target(receipt, (whole,)),
        "upload-message": Target(upload_message, (b"\x12\x03abc", b"\x0a\x02\x10\x05")),
        "tensors": Target(tensors, (payload,)),
        "update-manifest": Target(update_manifest, (manifest,)),
        "broadcast": Target(broadcast, (b'{"plan":{},"parts":[]}', manifest)),
        "admission": Target(admission, (manifest + SPLIT + payload,)),
    }
