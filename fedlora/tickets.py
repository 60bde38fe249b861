"""Tickets: what lets one client move the bytes of one task, and nothing else.

A ticket is the canonical JSON of its fields and their HMAC-SHA256 (RFC 2104,
https://www.rfc-editor.org/rfc/rfc2104), both in URL-safe base64, joined by a dot. Whoever
holds the key can make one, so the key stays on the server; nobody else can read more out of a
ticket than what it was given for.
"""

import base64
import hashlib
import hmac
import json
import math
import os
import re
import secrets
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from fedlora.errors import StorageError, TicketError
from fedlora.storage import storage_errors, sync_folder

KEY_BYTES = 32
MAX_TICKET_BYTES = 4096
# 80 characters, of at most four bytes each
MAX_CLIENT_BYTES = 320
MAX_BLOB_BYTES = 2**40
METADATA_KEY = "fedlora-ticket"
RUN = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}")


@dataclass(frozen=True)
class Ticket:
    """What one transfer may do.

    Attributes:
        run: lineage id of the run.
        round, attempt: of the task.
        client: name of the client; at most 320 bytes of UTF-8.
        node: Flower's node id of the client, unsigned 64 bits.
        direction: "up" for the client's reply, "down" for what the server offers.
        max_bytes: most bytes of one blob.
        expires_s: seconds since 1970-01-01 UTC, on the server's clock.

    Raises:
        TicketError: a field is outside its bounds.
    """

    run: str
    round: int
    attempt: int
    client: str
    node: int
    direction: Literal["up", "down"]
    max_bytes: int
    expires_s: float

    def __post_init__(self) -> None:
        if not isinstance(self.run, str) or not RUN.fullmatch(self.run):
            raise TicketError(f"run is {_shown(self.run)}; expected letters, digits, '.', '_', '-'")
        _check_count("round", self.round, 2**31)
        _check_count("attempt", self.attempt, 2**31)
        _check_count("node", self.node, 2**64)
        _check_count("max_bytes", self.max_bytes, MAX_BLOB_BYTES + 1)
        if not isinstance(self.client, str) or not 0 < _utf8_bytes(self.client) <= MAX_CLIENT_BYTES:
            raise TicketError(
                f"client is {_shown(self.client)}; expected 1 to {MAX_CLIENT_BYTES} bytes of UTF-8"
            )
        if self.direction not in ("up", "down"):
            raise TicketError(f"direction is {_shown(self.direction)}; expected up or down")
        is_number = isinstance(self.expires_s, int | float) and not isinstance(self.expires_s, bool)
        if not is_number or not math.isfinite(self.expires_s):
            raise TicketError(f"expires_s is {_shown(self.expires_s)}; expected a finite number")


def mint(key: bytes, ticket: Ticket) -> str:
    """The ticket as text, signed with `key` (32 bytes)."""
    fields = json.dumps(
        asdict(ticket), sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )
    return _signed(key, fields.encode())


def check(key: bytes, text: str, now_s: float) -> Ticket:
    """The ticket in `text`, which must bear the signature of `key` and be valid at `now_s`.

    Args:
        text: anything a peer sent.
        now_s: seconds since 1970-01-01 UTC.

    Raises:
        TicketError: says what is wrong with it.
    """
    if len(text) > MAX_TICKET_BYTES:
        raise TicketError(f"has {len(text)} characters; at most {MAX_TICKET_BYTES} are read")
    body, dot, _ = text.partition(".")
    if not dot:
        raise TicketError("is not a ticket: there is no dot between fields and signature")
    try:
        fields = base64.urlsafe_b64decode(body.encode("ascii"))
    except ValueError as e:
        raise TicketError("is not a ticket: its fields are not base64") from e
    # the whole text is compared, so that no ticket has a second spelling
    if not hmac.compare_digest(_signed(key, fields).encode(), text.encode("utf-8", "replace")):
        raise TicketError(
            "has a bad signature: it was changed, or made with another server's key; "
            "ask the server for a new one"
        )
    ticket = _ticket(fields)
    if now_s >= ticket.expires_s:
        raise TicketError(
            f"expired {now_s - ticket.expires_s:.0f} s ago: it was valid until "
            f"{_utc(ticket.expires_s)} and the server's clock says {_utc(now_s)}"
        )
    return ticket


def ticket_key(path: Path) -> bytes:
    """The key in the file `path`, made (32 random bytes, mode 0600) if there is none.

    Any number of processes may ask at once; all get the same key.

    Raises:
        StorageError: the file cannot be written, or does not hold a key.
    """
    if not path.exists():
        _make_key(path)
    try:
        key = path.read_bytes()
    except OSError as e:
        raise StorageError(f"ticket key {path} cannot be read: {e.strerror}") from e
    if len(key) != KEY_BYTES:
        raise StorageError(
            f"ticket key {path} has {len(key)} bytes; expected {KEY_BYTES}; delete the file to "
            "have a new key made (tickets in use become void)"
        )
    return key


def _make_key(path: Path) -> None:
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            try:
                os.write(descriptor, secrets.token_bytes(KEY_BYTES))
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            # a link never replaces the key of a process that was faster
            os.link(temporary, path)
        except FileExistsError:
            pass
        finally:
            temporary.unlink(missing_ok=True)
        sync_folder(path.parent)


def _signed(key: bytes, fields: bytes) -> str:
    signature = hmac.new(key, fields, hashlib.sha256).digest()
    return ".".join(base64.urlsafe_b64encode(part).decode() for part in (fields, signature))


def _ticket(fields: bytes) -> Ticket:
    try:
        value: Any = json.loads(fields)
        return Ticket(**value)
    except (ValueError, TypeError, RecursionError) as e:
        raise TicketError("has other fields than this version of fedlora writes") from e


def _check_count(name: str, value: Any, end: int) -> None:
    if type(value) is not int or not 0 <= value < end:
        raise TicketError(f"{name} is {_shown(value)}; expected an integer from 0 to {end - 1}")


def _utf8_bytes(text: str) -> int:
    try:
        return len(text.encode())
    except UnicodeEncodeError:
        return 0


def _shown(value: Any) -> str:
    return ascii(value)[:80]


def _utc(seconds: float) -> str:
    try:
        return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    except (ValueError, OverflowError, OSError):
        return f"{seconds:g} s"
