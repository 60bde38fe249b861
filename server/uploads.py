"""Upload: one client's reply on its way to the disk, resumable after any interruption."""

import fcntl
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from fedlora.errors import StorageError, UploadRefused
from fedlora.server.receipts import Receipt, decode_receipt, encode_receipt
from fedlora.storage import storage_errors, sync_folder, write_atomic

BLOCK_BYTES = 1 << 20


class UploadPlace:
    """Where the files of one client's reply in one attempt at a round are.

    Attributes:
        receipt: appears last, by a link, when the payload is whole and synced.
    """

    def __init__(self, run: Path, round: int, attempt: int, stem: str) -> None:
        self._inbox = run / "inbox" / f"{round}.{attempt}"
        self._partial = run / "partial" / f"{round}.{attempt}"
        self._closed = run / "closed" / str(round)
        self.receipt = self._inbox / f"{stem}.json"
        self._stem = stem
        self.lock = self._partial / f"{stem}.lock"
        self.draft = self._partial / f"{stem}.receipt"

    def payload(self, sha256: str) -> Path:
        """The whole payload."""
        return self._inbox / f"{self._stem}.{sha256}"

    def partial(self, sha256: str) -> Path:
        """What has come of it so far."""
        return self._partial / f"{self._stem}.{sha256}"

    def check_open(self) -> None:
        """The round still takes replies.

        Raises:
            UploadRefused: "closed".
        """
        if self._closed.exists():
            raise UploadRefused("closed", "the round is over and waits for no more replies")

    def make_folders(self) -> None:
        """Both folders, durable."""
        make_folder(self._inbox)
        make_folder(self._partial)

    def drop_others(self, sha256: str) -> None:
        """Deletes the begun uploads of the same reply with other bytes: one is kept at most."""
        kept = {self.partial(sha256).name, self.lock.name}
        for path in self._partial.glob(f"{self._stem}.*"):
            if path.name not in kept:
                path.unlink(missing_ok=True)


class Upload:
    """One upload under way; holds the lock of its place until it is closed.

    Args:
        place: where.
        receipt: what is announced.
        offset_bytes: where the client goes on; must be what is on disk.
        closed: called when the upload ends in whatever way.

    Attributes:
        held: bytes on disk, counted from the start.

    Raises:
        UploadRefused: "busy", "taken", "closed" or "offset".
        StorageError: the disk refused.
    """

    def __init__(
        self,
        place: UploadPlace,
        receipt: Receipt,
        offset_bytes: int,
        closed: Callable[["Upload"], None],
    ) -> None:
        self._place = place
        self._announced = receipt
        self._closed = closed
        self._digest = hashlib.sha256()
        self.held = 0
        path = place.partial(receipt.sha256)
        place.check_open()
        with storage_errors(path):
            place.make_folders()
            self._lock = os.open(place.lock, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            self._take_lock()
            with storage_errors(path):
                place.drop_others(receipt.sha256)
                self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        except BaseException:
            os.close(self._lock)
            raise
        try:
            self._go_on(offset_bytes)
        except BaseException:
            os.close(self._file)
            os.close(self._lock)
            raise

    @property
    def missing(self) -> int:
        """Bytes still to come."""
        return self._announced.size_bytes - self.held

    def append(self, chunk: bytes | memoryview) -> None:
        """The next bytes.

        Raises:
            UploadRefused: "size", more than announced.
            StorageError: the disk refused; what was written before stays for another try.
        """
        if len(chunk) > self.missing:
            raise UploadRefused(
                "size", f"more than the {self._announced.size_bytes} bytes that were announced"
            )
        view = memoryview(chunk)
        with storage_errors(self._place.partial(self._announced.sha256)):
            while view:
                written = os.write(self._file, view)
                self._digest.update(view[:written])
                self.held += written
                view = view[written:]

    def finish(self) -> Receipt:
        """The receipt, when payload and receipt are on disk, whole, checked and synced.

        Raises:
            UploadRefused: "size" (something is missing; what came is kept), "digest" (other
                bytes than announced; all of them are dropped), "closed" or "taken".
            StorageError: the disk refused.
        """
        announced = self._announced
        if self.missing:
            raise UploadRefused("size", f"{self.held} of {announced.size_bytes} bytes came")
        partial, payload = (
            self._place.partial(announced.sha256),
            self._place.payload(announced.sha256),
        )
        if self._digest.hexdigest() != announced.sha256:
            partial.unlink(missing_ok=True)
            raise UploadRefused(
                "digest",
                f"the bytes have SHA-256 {self._digest.hexdigest()}; announced was "
                f"{announced.sha256}; send them again from the start",
            )
        with storage_errors(payload):
            os.fsync(self._file)
            # before the check, so that closing either is seen here or deletes what is made here
            self._place.make_folders()
            self._place.check_open()
            os.rename(partial, payload)
            sync_folder(payload.parent)
            write_atomic(self._place.draft, encode_receipt(announced))
            try:
                os.link(self._place.draft, self._place.receipt)
            except FileExistsError:
                raise UploadRefused("taken", "the client has replied already") from None
            finally:
                self._place.draft.unlink(missing_ok=True)
            sync_folder(self._place.receipt.parent)
        return announced

    def close(self) -> None:
        """Lets the place go; what came so far stays for another try."""
        os.close(self._file)
        os.close(self._lock)
        self._closed(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _take_lock(self) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            raise UploadRefused("busy", "another upload of this reply is under way") from e
        except OSError as e:
            raise StorageError(f"{self._place.lock} cannot be locked: {e.strerror}") from e
        if self._place.receipt.exists():
            found = decode_receipt(self._place.receipt.read_bytes())
            if found.sha256 == self._announced.sha256:
                # an upload of the same bytes was faster; Stat will say so
                raise UploadRefused("busy", "the reply has just come")
            raise UploadRefused("taken", f"the client has replied with {found.sha256}")

    def _go_on(self, offset_bytes: int) -> None:
        """Takes up what an earlier upload left."""
        with storage_errors(self._place.partial(self._announced.sha256)):
            size = os.fstat(self._file).st_size
            if size > self._announced.size_bytes:
                os.ftruncate(self._file, 0)
                size = 0
            if offset_bytes != size:
                raise UploadRefused("offset", f"begins at {offset_bytes}; the server has {size}")
            while self.held < size:
                block = os.pread(self._file, BLOCK_BYTES, self.held)
                self._digest.update(block)
                self.held += len(block)


def make_folder(path: Path) -> None:
    """`path` and its parents, so that they outlive a power cut."""
    if path.is_dir():
        return
    make_folder(path.parent)
    path.mkdir(exist_ok=True)
    sync_folder(path.parent)
