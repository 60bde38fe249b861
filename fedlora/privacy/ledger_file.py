"""The files of one privacy ledger, and what is refused when they do not fit together.

In the folder of a data set: `ledger`, one line per entry, only ever appended to; `head`, a copy
of the last line, replaced atomically *before* the line is appended; `lock`, which every look
and every change takes. So a process that dies while it appends leaves a tail that `head`
completes: the entry counts. Anything else that is missing, cut off or changed is refused, since
a ledger that forgets would let data be used beyond its budget. `known`, beside the folder of all
ledgers, remembers which data sets have one, so that a deleted folder is noticed too. A copy of
the whole site that is put back is noticed by whoever saw a later head.
"""

import fcntl
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedlora.errors import LedgerError
from fedlora.privacy.ledger_entry import (
    Entry,
    Header,
    checked,
    decode_entry,
    decode_header,
    decode_line,
    line_hash,
)
from fedlora.privacy.ledger_state import LedgerState
from fedlora.storage import sealed, storage_errors, sync_folder, unsealed, write_atomic

_POLL_S = 0.05


class LedgerFile:
    """The ledger of one data set on disk.

    Args:
        folder: of the data set; its name is the data set's identity. Created if missing.
        wait_s: how long another process may hold the lock.

    Raises:
        StorageError: the folder cannot be created.
    """

    def __init__(self, folder: Path, wait_s: float) -> None:
        self.folder = folder
        self._wait_s = wait_s
        with storage_errors(folder):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        self._thread = threading.Lock()
        # what was read last, and of which bytes
        self._state: LedgerState | None = None
        self._seen: tuple[int, int, bytes] | None = None

    def close(self) -> None:
        """Lets go of the lock file."""
        os.close(self._lock)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Holds the lock.

        Raises:
            LedgerError: another process holds it for too long.
        """
        with self._thread:
            deadline = time.monotonic() + self._wait_s
            while True:
                try:
                    fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        raise LedgerError(
                            f"privacy ledger {self.folder} is held by another process for more "
                            f"than {self._wait_s:g} s; end that process, then try again"
                        ) from None
                    time.sleep(_POLL_S)
            try:
                yield
            finally:
                fcntl.flock(self._lock, fcntl.LOCK_UN)

    def load(self) -> LedgerState | None:
        """What the ledger says now, its tail completed; None if this data set never had one.

        The lock must be held.

        Raises:
            LedgerError: the files are not as they were left.
            StorageError: the tail could not be completed.
        """
        if self._state is not None and self._seen == _stamp(self.folder):
            return self._state
        self._state = None
        read = read_lines(self.folder)
        if read is None:
            return None
        lines, intact = read
        state = fold(self.folder, lines)
        if intact is not None:
            self._complete(lines[-1], intact)
        self._remember(state)
        return state

    def create(self, header: Header) -> LedgerState:
        """A new ledger; the lock must be held and `load` have found none."""
        line = header.to_line()
        self._append(line)
        with storage_errors(self.folder):
            sync_folder(self.folder)
            sync_folder(self.folder.parent)
        # last: whoever dies before it leaves a data set that was never used
        _mark_known(self.folder, "")
        state = LedgerState(header, [line_hash(line)])
        self._remember(state)
        return state

    def append(self, entry: Entry) -> None:
        """Makes an entry durable; the lock must be held and the state be loaded.

        Raises:
            StorageError: the disk refused; the entry may count all the same.
        """
        state, line = self._state, entry.to_line()
        assert state is not None
        state.apply(entry, line_hash(line))
        # until both files have it, the next look is at the disk
        self._state = None
        self._append(line)
        self._remember(state)

    def _append(self, line: bytes) -> None:
        write_atomic(self.folder / "head", sealed(line))
        self._write_end(line)

    def _complete(self, line: bytes, intact: int) -> None:
        with storage_errors(self.folder / "ledger"):
            if (self.folder / "ledger").exists():
                os.truncate(self.folder / "ledger", intact)
        self._write_end(line)
        with storage_errors(self.folder):
            sync_folder(self.folder)

    def _write_end(self, line: bytes) -> None:
        path = self.folder / "ledger"
        with storage_errors(path):
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            try:
                view = memoryview(line)
                while view:
                    view = view[os.write(descriptor, view) :]
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    def _remember(self, state: LedgerState) -> None:
        self._state, self._seen = state, _stamp(self.folder)


def read_lines(folder: Path) -> tuple[list[bytes], int | None] | None:
    """Every line of a ledger; None if this data set never had one.

    Returns:
        the lines, and None if all are in the file, or how many bytes of the file stand before
        the last line, which comes from `head`.

    Raises:
        LedgerError: files are missing, cut off, or not of one another.
    """
    data, head = _content(folder / "ledger"), _content(folder / "head")
    gone = "is missing, and its data was already trained on"
    if head is None and data is None:
        if known(folder) == "":
            raise refusal(folder, gone)
        return None
    if head is None:
        raise refusal(folder, "has no head file, so nobody can tell whether it is complete")
    try:
        last = unsealed(head)
        number = int(decode_line(last)["seq"])
    except (ValueError, KeyError, TypeError) as e:
        raise refusal(folder, f"has a damaged head file: {e}") from e
    if data is None and (number or known(folder) == ""):
        raise refusal(folder, gone)
    *whole, tail = (data or b"").split(b"\n")
    lines = [line + b"\n" for line in whole]
    if len(lines) == number + 1 and not tail:
        if lines[-1] != last:
            raise refusal(folder, f"is damaged: line {number} is not the one in its head file")
        return lines, None
    # a file system may leave zeros where bytes never came
    if len(lines) == number and last.startswith(tail.rstrip(b"\0")):
        return [*lines, last], len(data or b"") - len(tail)
    if len(lines) <= number:
        raise refusal(folder, f"ends in line {len(lines) - 1}; its head file knows line {number}")
    raise refusal(folder, f"goes beyond line {number}, which its head file calls the last")


def fold(folder: Path, lines: list[bytes]) -> LedgerState:
    """What the lines add up to.

    Raises:
        LedgerError: one is damaged or does not follow from those before it.
    """
    number = 0
    try:
        # all checksums first: they are cheap, and name the damage where it is
        for number in range(len(lines)):
            checked(lines[number])
        number = 0
        state = LedgerState(decode_header(lines[0]), [line_hash(lines[0])])
        for number in range(1, len(lines)):
            state.apply(decode_entry(lines[number]), line_hash(lines[number]))
    except ValueError as e:
        raise refusal(folder, f"is damaged in line {number}: {e}") from e
    return state


def refusal(folder: Path, what: str) -> LedgerError:
    """The error that nothing is trained on this data until somebody looks at it."""
    return LedgerError(
        f"privacy ledger {folder} {what}; put back the whole folder as it was after the last "
        "release, or begin a new budget, which keeps what is there aside and does not undo what "
        f"was spent: fedlora privacy ledger {folder} --new-budget"
    )


def known(folder: Path) -> str | None:
    """None: this data set never had a ledger; "": it has one; else the folder put aside."""
    content = _content(_marker(folder))
    return None if content is None else content.decode("utf-8", "replace").strip()


def known_here(ledgers: Path) -> list[str]:
    """Data sets that have a ledger in this folder of ledgers, or had one that was lost."""
    markers = _marker(ledgers / "x").parent
    names = [path.name for path in sorted(markers.glob("*")) if path.is_file()]
    return [name for name in names if known(ledgers / name) == ""]


def set_aside(folder: Path) -> Path | None:
    """Puts a data set's ledger aside, so that the next one begins with nothing spent.

    Returns:
        where it is now; None if there was nothing to keep.

    Raises:
        LedgerError: no ledger was ever kept here.
        StorageError: the disk refused.
    """
    if not (folder / "ledger").exists() and not (folder / "head").exists():
        if known(folder) is None:
            raise LedgerError(f"{folder} is no privacy ledger, and none is known to have been here")
        _mark_known(folder, "a ledger that was lost")
        return None
    number = 1
    while (aside := folder.with_name(f"{folder.name}.aside-{number}")).exists():
        number += 1
    with storage_errors(folder):
        os.rename(folder, aside)
        sync_folder(folder.parent)
    _mark_known(folder, aside.name)
    return aside


def _mark_known(folder: Path, content: str) -> None:
    marker = _marker(folder)
    with storage_errors(marker):
        marker.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        sync_folder(marker.parent.parent)
    write_atomic(marker, content.encode())


def _marker(folder: Path) -> Path:
    ledgers = folder.absolute().parent
    return ledgers.with_name(ledgers.name + "-known") / folder.name


def _content(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def _stamp(folder: Path) -> tuple[int, int, bytes] | None:
    """Changes when another process appends."""
    try:
        found = (folder / "ledger").stat()
        return found.st_size, found.st_mtime_ns, (folder / "head").read_bytes()
    except FileNotFoundError:
        return None
