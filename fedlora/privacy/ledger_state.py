"""What the entries of a privacy ledger add up to.

A reservation is charged in full from the moment it stands in the ledger. It costs less only
once an entry says so: SPENT with fewer steps, or VOID. So a process that dies says nothing and
has spent everything it asked for.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from fedlora.privacy.accounting import Event, merged
from fedlora.privacy.ledger_entry import Entry, Header, Release, Status

# which status a reservation must be in for the next one
BEFORE: dict[Status, Status] = {"SPENT": "RESERVED", "RELEASED": "SPENT", "VOID": "RESERVED"}


@dataclass
class Reservation:
    """Where one reservation stands.

    Attributes:
        entry: by which it was made.
        status: the last that was said of it.
        events: what it is charged.
        payload_sha256: of what was released, once SPENT.
    """

    entry: Entry
    status: Status
    events: tuple[Event, ...]
    payload_sha256: str = ""


@dataclass
class LedgerState:
    """Everything that a ledger says.

    Attributes:
        header: what it is about.
        hashes: SHA-256 of every line so far, the header's first.
        entries: in order.
        reservations: seq -> where it stands.
    """

    header: Header
    hashes: list[str]
    entries: list[Entry] = field(default_factory=list)
    reservations: dict[int, Reservation] = field(default_factory=dict)

    @property
    def head(self) -> tuple[int, str]:
        """Number and hash of the last line."""
        return len(self.hashes) - 1, self.hashes[-1]

    def apply(self, entry: Entry, line_sha256: str) -> None:
        """Takes the next entry.

        Raises:
            ValueError: it does not follow from what is there; nothing was taken.
        """
        seq, last = self.head
        if (entry.seq, entry.prev) != (seq + 1, last):
            raise ValueError("the entry does not follow the one before it")
        if entry.status == "RESERVED":
            if entry.reserved != entry.seq:
                raise ValueError("a reservation that names another")
            self.reservations[entry.seq] = Reservation(entry, "RESERVED", entry.events)
        else:
            self._move(entry)
        self.entries.append(entry)
        self.hashes.append(line_sha256)

    def _move(self, entry: Entry) -> None:
        found = self.reservations.get(entry.reserved)
        if found is None or found.entry.release != entry.release:
            raise ValueError(f"{entry.status} without its reservation")
        if found.status != BEFORE[entry.status]:
            raise ValueError(f"{entry.status} of a reservation that is {found.status}")
        if entry.status == "SPENT":
            if not within(entry.events, found.events):
                raise ValueError("more was spent than was reserved")
            found.events = entry.events
            found.payload_sha256 = entry.payload_sha256
        elif entry.status == "VOID":
            found.events = ()
        found.status = entry.status

    def charged(self, run: str | None = None) -> list[Event]:
        """What a run has spent, or all runs together; reservations count in full."""
        found = (
            event
            for held in self.reservations.values()
            if run in (None, held.entry.release.run)
            for event in held.events
        )
        return merged(found, kinds=True)

    def runs(self) -> list[str]:
        """Every run, in the order of its first reservation."""
        return list(dict.fromkeys(held.entry.release.run for held in self.reservations.values()))

    def unspent(self, release: Release) -> Reservation | None:
        """The newest reservation of exactly this release that nothing was said of since."""
        for held in reversed(self.reservations.values()):
            if held.status == "RESERVED" and held.entry.release == release:
                return held
        return None

    def spent(self, release: Release) -> Reservation | None:
        """The newest that was spent for this run, round and start, in whatever attempt."""
        wanted = replace(release, attempt=0)
        for held in reversed(self.reservations.values()):
            if held.status not in ("SPENT", "RELEASED"):
                continue
            if replace(held.entry.release, attempt=0) == wanted:
                return held
        return None


def within(actual: Iterable[Event], planned: Iterable[Event]) -> bool:
    """Whether nothing was done that was not planned: no other rate or noise, no more steps."""
    allowed = {(event.rate, event.noise): event.steps for event in merged(planned)}
    return all(event.steps <= allowed.get((event.rate, event.noise), 0) for event in merged(actual))
