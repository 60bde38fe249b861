"""Entries of a privacy ledger as lines of text, each chained to the one before by SHA-256.

A line is canonical JSON, a tab and its CRC-32, so that no bit changes unnoticed; numbers that
accounting depends on are hexadecimal floats, so that they come back exactly. Line 0 is the
header. What a line may say is checked here; which lines may follow each other in ledger_state.
"""

import hashlib
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from fedlora.errors import ConfigError
from fedlora.privacy.accounting import Event
from fedlora.privacy.budget import Budget

SCHEMA = 1
ADJACENCY = "add or remove one unit"
NO_HASH = "0" * 64

Status = Literal["RESERVED", "SPENT", "RELEASED", "VOID"]
STATUSES: tuple[Status, ...] = ("RESERVED", "SPENT", "RELEASED", "VOID")
Detail = str | int | float | None


@dataclass(frozen=True)
class Release:
    """One thing that leaves the site, or is committed by the server.

    Attributes:
        run: lineage of the run.
        round: from 1.
        attempt: of the round, from 1.
        start_sha256: digest of what the work starts from.
    """

    run: str
    round: int
    attempt: int
    start_sha256: str

    def __str__(self) -> str:
        return f"round {self.round} (attempt {self.attempt}) of run {self.run!r}"


@dataclass(frozen=True)
class Header:
    """What a ledger is about.

    Attributes:
        dataset: identity of the data, in hexadecimal.
        unit: "record" or "client".
        created: time in UTC.
        follows: folder of an older ledger of this data that an operator put aside, or "".
    """

    dataset: str
    unit: str
    created: str
    follows: str = ""

    def to_line(self) -> bytes:
        """Line 0."""
        tree = {**vars(self), "schema": SCHEMA, "adjacency": ADJACENCY, "seq": 0, "prev": NO_HASH}
        return encode_line(tree)


@dataclass(frozen=True)
class Entry:
    """One step in the life of a reservation.

    Attributes:
        seq: number of the line, from 1.
        prev: SHA-256 of the line before, in hexadecimal.
        time: in UTC, for people only.
        status: RESERVED opens a reservation; SPENT, RELEASED and VOID refer to one.
        reserved: seq of that reservation; its own for RESERVED.
        release: what it is for.
        events: planned for RESERVED, actual for SPENT, empty for the others.
        payload_sha256: of what was released; SPENT only.
        epsilons: of the run and in all after this entry, when it was written; not trusted.
        budgets: the run's and the site's, against which RESERVED was checked.
        details: what else the caller tells, e.g. the clip norm.
    """

    seq: int
    prev: str
    time: str
    status: Status
    reserved: int
    release: Release
    events: tuple[Event, ...] = ()
    payload_sha256: str = ""
    epsilons: tuple[float, float] = (0.0, 0.0)
    budgets: tuple[Budget | None, Budget | None] = (None, None)
    details: Mapping[str, Detail] = field(default_factory=dict)

    def to_line(self) -> bytes:
        """The entry as it stands in the file, with its newline."""
        return encode_line(
            {
                "seq": self.seq,
                "prev": self.prev,
                "time": self.time,
                "status": self.status,
                "reserved": self.reserved,
                **vars(self.release),
                "events": [
                    [event.rate.hex(), event.noise.hex(), event.steps, event.kind]
                    for event in self.events
                ],
                "payload_sha256": self.payload_sha256,
                "epsilons": [float(number).hex() for number in self.epsilons],
                "budgets": [budget and _budget_out(budget) for budget in self.budgets],
                "details": dict(self.details),
            }
        )


def encode_line(tree: Mapping[str, Any]) -> bytes:
    """Canonical JSON, a tab, the CRC-32 of what is before, a newline."""
    text = json.dumps(tree, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
    return b"%s\t%08x\n" % (text, zlib.crc32(text))


def checked(line: bytes) -> bytes:
    """The text of a line that has its checksum.

    Raises:
        ValueError: it is no whole line, or not as it was written.
    """
    text, tab, check = line.rpartition(b"\t")
    if not tab or check != b"%08x\n" % zlib.crc32(text):
        raise ValueError("it does not have its checksum")
    return text


def decode_line(line: bytes) -> dict[str, Any]:
    """What `encode_line` was given.

    Raises:
        ValueError: it is something else.
    """
    tree = json.loads(checked(line))
    if not isinstance(tree, dict):
        raise ValueError("it is no object")
    return tree


def line_hash(line: bytes) -> str:
    """What the next line names as `prev`."""
    return hashlib.sha256(line).hexdigest()


def decode_header(line: bytes) -> Header:
    """The header in line 0.

    Raises:
        ValueError: it is none, or of another schema.
    """
    tree = decode_line(line)
    if tree.get("schema") != SCHEMA or tree.get("seq") != 0:
        raise ValueError(f"line 0 is no header of schema {SCHEMA}")
    try:
        names = ("dataset", "unit", "created", "follows")
        return Header(**{name: str(tree[name]) for name in names})
    except KeyError as e:
        raise ValueError(f"the header has no {e}") from e


def decode_entry(line: bytes) -> Entry:
    """The entry in a later line.

    Raises:
        ValueError: it is none, or a number in it is out of its range.
    """
    tree = decode_line(line)
    try:
        if tree["status"] not in STATUSES:
            raise ValueError(f"status {tree['status']!r} is not known")
        return Entry(
            seq=int(tree["seq"]),
            prev=str(tree["prev"]),
            time=str(tree["time"]),
            status=tree["status"],
            reserved=int(tree["reserved"]),
            release=Release(
                str(tree["run"]), int(tree["round"]), int(tree["attempt"]), tree["start_sha256"]
            ),
            events=_events_in(tree["events"]),
            payload_sha256=str(tree["payload_sha256"]),
            epsilons=(float.fromhex(tree["epsilons"][0]), float.fromhex(tree["epsilons"][1])),
            budgets=(_budget_in(tree["budgets"][0]), _budget_in(tree["budgets"][1])),
            details=tree["details"],
        )
    except (KeyError, TypeError, IndexError, ConfigError) as e:
        raise ValueError(f"it is no entry: {e}") from e


def _events_in(rows: Sequence[Any]) -> tuple[Event, ...]:
    return tuple(
        Event(float.fromhex(rate), float.fromhex(noise), steps, str(kind))
        for rate, noise, steps, kind in rows
    )


def _budget_out(budget: Budget) -> list[str | None]:
    limit = budget.epsilon
    return [None if limit is None else float(limit).hex(), float(budget.delta).hex()]


def _budget_in(row: Sequence[Any] | None) -> Budget | None:
    if row is None:
        return None
    limit = None if row[0] is None else float.fromhex(row[0])
    return Budget(limit, float.fromhex(row[1]))
