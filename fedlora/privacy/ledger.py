"""The privacy ledger: what was spent on one data set, over all runs, processes and crashes.

A release is reserved, durably and in full, before the first sample is read; then its bytes are
kept and it is SPENT; then, once the other side has it, RELEASED. Whoever dies in between has
spent the reservation. Sending the same bytes again is free, since it reveals nothing new; doing
the work again is another release, with other noise, and is charged again.

Two budgets hold at once: that of the run, and that of the site for all runs together. Both are
measured by Renyi accounting; see `fedlora.privacy.accounting`.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Self

from fedlora import __version__
from fedlora.errors import ConfigError, LedgerError
from fedlora.privacy.accounting import Accountant, Event, epsilon
from fedlora.privacy.budget import Budget
from fedlora.privacy.ledger_entry import Detail, Entry, Header, Release, Status
from fedlora.privacy.ledger_file import LedgerFile, known, refusal
from fedlora.privacy.ledger_state import LedgerState, Reservation, within
from fedlora.storage import storage_errors, write_atomic

__all__ = ["Budget", "Ledger", "Release"]

# a server goes back by less than this when it resumes
_KEPT_ROUNDS = 3
_HEX = set("0123456789abcdef")


class Ledger:
    """The ledger of one data set; open it with `Ledger.open`.

    Several processes may have it open: each look and each change takes the lock and reads what
    the others wrote.
    """

    def __init__(self, file: LedgerFile, budget: Budget, site: Budget | None) -> None:
        self._file = file
        self._budget = budget
        self._site = site
        self._mine: set[int] = set()

    @classmethod
    def open(
        cls,
        folder: Path,
        key: str,
        *,
        unit: str,
        epsilon: float | None,
        delta: float,
        site: Budget | None = None,
        expected: tuple[int, str] | None = None,
        wait_s: float = 30.0,
    ) -> Self:
        """The ledger of a data set, begun if the data set never had one.

        Args:
            folder: of all ledgers of the site.
            key: identity of the data set in hexadecimal, e.g. from `dataset_id`.
            unit: "record" or "client".
            epsilon: budget of every run by itself; None for no limit.
            delta: at which that is measured.
            site: budget of all runs together.
            expected: a head that somebody else has seen; it must be in the ledger.
            wait_s: how long another process may hold the lock.

        Raises:
            LedgerError: the ledger is missing, damaged, rolled back, of other data or another
                unit, or locked for too long.
            StorageError: the disk refused.
            ConfigError: `key` is no identity.
        """
        if len(key) < 16 or not set(key) <= _HEX:
            raise ConfigError(f"identity of a data set is {key!r}; expected hexadecimal digits")
        file = LedgerFile(folder / key, wait_s)
        try:
            with file.locked():
                state = file.load() or file.create(
                    Header(key, unit, _now(), known(folder / key) or "")
                )
                _check_header(file.folder, state, key, unit)
                if expected is not None:
                    _check_expected(file.folder, state, expected)
        except BaseException:
            file.close()
            raise
        return cls(file, Budget(epsilon, delta), site)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()

    @property
    def head(self) -> tuple[int, str]:
        """Number and hash of the last entry."""
        with self._state() as state:
            return state.head

    def charged(self, run: str | None = None) -> list[Event]:
        """What a run has spent, or all together; reservations count in full."""
        with self._state() as state:
            return state.charged(run)

    def epsilon(self, run: str | None = None, accountant: Accountant = "rdp") -> float:
        """What a run has spent, at its delta; or all together, at the site's."""
        whole = run is None and self._site is not None
        delta = self._site.delta if whole and self._site else self._budget.delta
        return epsilon(self.charged(run), delta, accountant)

    def reserve(
        self,
        release: Release,
        events: Sequence[Event],
        details: Mapping[str, Detail] | None = None,
    ) -> None:
        """Charges a release before any sample is read for it; durable on return.

        Args:
            release: what for.
            events: everything that it may do at most.
            details: what else to write down, e.g. the clip norm.

        Raises:
            BudgetExhausted: it does not fit into the run's budget, or the site's.
            LedgerError, StorageError: as `open`; do not train.
        """
        with self._state() as state:
            run, everything = state.charged(release.run), state.charged()
            after = (
                self._budget.after(run, events, "run", str(release)),
                self._site.after(everything, events, "site", str(release)) if self._site else 0.0,
            )
            seq = state.head[0] + 1
            self._append(state, "RESERVED", seq, release, events, after=after, details=details)
            self._mine.add(seq)

    def spend(
        self,
        release: Release,
        events_actual: Sequence[Event],
        payload: bytes,
        details: Mapping[str, Detail] | None = None,
    ) -> None:
        """Keeps the bytes of a reserved release, then charges what it really did.

        Args:
            release: as reserved.
            events_actual: no other rate or noise, and no more steps, than reserved.
            payload: what will be sent.
            details: what else to write down, e.g. the number of empty batches.

        Raises:
            LedgerError: it was not reserved, or more was done than that.
            StorageError: the disk refused; the reservation stands, nothing may be sent.
        """
        with self._state() as state:
            held = self._reserved(state, release)
            if not within(events_actual, held.events):
                raise LedgerError(
                    f"{release} did {list(events_actual)}, reserved were "
                    f"{list(held.events)}; nothing may be sent, and the reservation stands"
                )
            path, digest = self._payload(held), hashlib.sha256(payload).hexdigest()
            with storage_errors(path):
                path.parent.mkdir(exist_ok=True, mode=0o700)
            write_atomic(path, payload)
            seq = held.entry.seq
            self._append(state, "SPENT", seq, release, events_actual, digest, details=details)
            self._forget_payloads(state, release)

    def cached(self, release: Release) -> bytes | None:
        """The bytes kept for the same run, round and start, to be sent again free of charge."""
        with self._state() as state:
            held = state.spent(release)
            if held is None:
                return None
            with suppress(OSError):
                payload = self._payload(held).read_bytes()
                if hashlib.sha256(payload).hexdigest() == held.payload_sha256:
                    return payload
            return None

    def released(self, release: Release) -> None:
        """Notes that the other side has what was spent; again changes nothing.

        Raises:
            LedgerError: it was not spent.
        """
        with self._state() as state:
            held = state.spent(release)
            if held is None:
                raise LedgerError(f"{release} was sent, but never spent in this ledger")
            if held.status == "SPENT":
                self._append(state, "RELEASED", held.entry.seq, held.entry.release)

    def void(self, release: Release) -> None:
        """Takes back a reservation for which no sample was read.

        Only who made it can know: a reservation of another process, or of one that died, stands.

        Raises:
            LedgerError: this object made no such reservation, or it is spent.
        """
        with self._state() as state:
            held = self._reserved(state, release)
            if held.entry.seq not in self._mine:
                raise LedgerError(f"{release} was reserved by another process; it stands")
            self._append(state, "VOID", held.entry.seq, release)

    def _reserved(self, state: LedgerState, release: Release) -> Reservation:
        held = state.unspent(release)
        if held is None:
            raise LedgerError(f"{release} is not reserved in this ledger; reserve it first")
        return held

    @contextmanager
    def _state(self) -> Iterator[LedgerState]:
        with self._file.locked():
            state = self._file.load()
            if state is None:
                raise refusal(self._file.folder, "disappeared while it was in use")
            yield state

    def _append(
        self,
        state: LedgerState,
        status: Status,
        reserved: int,
        release: Release,
        events: Sequence[Event] = (),
        payload_sha256: str = "",
        after: tuple[float, float] = (0.0, 0.0),
        details: Mapping[str, Detail] | None = None,
    ) -> None:
        last, sha256 = state.head
        self._file.append(
            Entry(
                seq=last + 1,
                prev=sha256,
                time=_now(),
                status=status,
                reserved=reserved,
                release=release,
                events=tuple(events),
                payload_sha256=payload_sha256,
                epsilons=after,
                budgets=(self._budget, self._site) if status == "RESERVED" else (None, None),
                details={"fedlora": __version__, **(details or {})},
            )
        )

    def _payload(self, held: Reservation) -> Path:
        return self._file.folder / "releases" / f"{held.entry.seq:08d}"

    def _forget_payloads(self, state: LedgerState, release: Release) -> None:
        """Drops bytes that no server asks for any more; their charge stands."""
        for held in state.reservations.values():
            past = held.entry.release
            if past.run == release.run and past.round <= release.round - _KEPT_ROUNDS:
                with suppress(OSError):
                    self._payload(held).unlink()


def _check_header(folder: Path, state: LedgerState, key: str, unit: str) -> None:
    found = state.header
    if found.dataset != key:
        raise refusal(folder, f"is that of another data set, {found.dataset}, not of {key}")
    if found.unit != unit:
        raise LedgerError(
            f"privacy ledger {folder} protects one {found.unit}, this run one {unit}: the two do "
            f'not add up; choose privacy.unit = "{found.unit}"'
        )


def _check_expected(folder: Path, state: LedgerState, expected: tuple[int, str]) -> None:
    seq, sha256 = expected
    if not 0 <= seq < len(state.hashes) or state.hashes[seq] != sha256:
        raise refusal(
            folder,
            f"was rolled back: entry {seq} with hash {sha256[:12]} was seen and is not in it",
        )


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
