"""Blob store: the bytes of a federation on disk, shared by the exchange and the round loop.

    <folder>/<run>/offers/<sha256>                          what clients can fetch
    <folder>/<run>/inbox/<round>.<attempt>/<client>.json    receipts, each after its payload:
    <folder>/<run>/inbox/<round>.<attempt>/<client>.<sha256>
    <folder>/<run>/partial/<round>.<attempt>/...            uploads under way
    <folder>/<run>/closed/<round>                           rounds that take no more replies

Several processes use one store at the same time and any of them may be killed at any point:
files appear whole, by a rename or a link after fsync, and no process keeps in memory what
another needs. The round loop offers, collects and deletes; the exchange serves and receives.
"""

import hashlib
import os
import secrets
import shutil
import threading
from collections.abc import Collection, Iterator
from pathlib import Path

from fedlora.errors import StorageError, UploadRefused
from fedlora.server.receipts import DIGEST, Receipt, decode_receipt, file_stem
from fedlora.server.uploads import Upload, UploadPlace, make_folder
from fedlora.storage import storage_errors, write_atomic
from fedlora.tickets import RUN, Ticket

TRASH = ".trash."


class BlobStore:
    """Offers and replies by run.

    Args:
        folder: made when missing.
        max_bytes: most bytes of all runs together, None for what the disk holds.

    Raises:
        StorageError: the folder cannot be made.
    """

    def __init__(self, folder: Path, max_bytes: int | None = None) -> None:
        self.folder = folder
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._uploads: set[Upload] = set()
        self._receipts: dict[Path, dict[str, Receipt]] = {}
        with storage_errors(folder):
            make_folder(folder.absolute())

    def offer(self, run: str, data: bytes) -> str:
        """Puts `data` on offer in `run`, once; returns its SHA-256.

        Raises:
            StorageError: the disk refused.
        """
        digest = hashlib.sha256(data).hexdigest()
        path = self._run(run) / "offers" / digest
        if not path.is_file():
            with storage_errors(path):
                make_folder(path.parent)
            write_atomic(path, data)
        return digest

    def offered(self, run: str, digest: str) -> Path | None:
        """The file of a blob on offer in `run`, None if it is not."""
        if not DIGEST.fullmatch(digest):
            return None
        path = self._run(run) / "offers" / digest
        return path if path.is_file() else None

    def withdraw(self, run: str, keep: Collection[str]) -> None:
        """Ends all offers of `run` but those with the digests `keep`."""
        for path in _entries(self._run(run) / "offers"):
            if path.name not in keep:
                path.unlink(missing_ok=True)

    def held(self, ticket: Ticket, digest: str) -> tuple[int, bool]:
        """Bytes of the ticket's reply that are here, and whether it is whole and checked.

        Raises:
            UploadRefused: "taken", the client has sent another reply, or "closed".
        """
        receipt = self.receipt(ticket)
        if receipt is not None:
            if receipt.sha256 != digest:
                raise UploadRefused("taken", f"the client has replied with {receipt.sha256}")
            return receipt.size_bytes, True
        self._place(ticket).check_open()
        try:
            return self._place(ticket).partial(digest).stat().st_size, False
        except FileNotFoundError:
            return 0, False

    def receipt(self, ticket: Ticket) -> Receipt | None:
        """The receipt of the ticket's reply, if it has come."""
        try:
            return _read_receipt(self._place(ticket).receipt)
        except FileNotFoundError:
            return None

    def begin_upload(
        self,
        ticket: Ticket,
        digest: str,
        size_bytes: int,
        offset_bytes: int,
        manifest: bytes,
        bytes_down: int = 0,
    ) -> Upload:
        """Starts or continues the reply that `ticket` asks for; close what is returned.

        Raises:
            UploadRefused: "busy", "taken", "closed" or "offset".
            StorageError: no room for it.
        """
        receipt = Receipt(ticket.client, ticket.node, digest, size_bytes, manifest, bytes_down)
        upload = Upload(self._place(ticket), receipt, offset_bytes, self._ended)
        try:
            with self._lock:
                self._check_room(upload.missing)
                self._uploads.add(upload)
        except BaseException:
            upload.close()
            raise
        return upload

    def received(self, run: str, round: int, attempt: int) -> dict[str, Receipt]:
        """The replies that have come in one attempt at a round, by client.

        Raises:
            StorageError: a receipt is damaged.
        """
        folder = self._run(run) / "inbox" / f"{round}.{attempt}"
        known = self._receipts.setdefault(folder, {})
        found = {}
        for path in _entries(folder):
            if path.suffix != ".json":
                continue
            if path.name not in known:
                known[path.name] = _read_receipt(path)
            found[known[path.name].client] = known[path.name]
        return found

    def payload(self, run: str, round: int, attempt: int, receipt: Receipt) -> bytes:
        """The bytes of a reply, checked once more.

        Raises:
            StorageError: they are gone, or not what was received.
        """
        place = UploadPlace(self._run(run), round, attempt, file_stem(receipt.client))
        path = place.payload(receipt.sha256)
        try:
            data = path.read_bytes()
        except OSError as e:
            raise StorageError(f"{path} cannot be read: {e.strerror}") from e
        if hashlib.sha256(data).hexdigest() != receipt.sha256:
            raise StorageError(f"{path} does not hold what was received; check the disk")
        return data

    def forget_round(self, run: str, round: int) -> None:
        """Closes a round for good and deletes the replies of all its attempts, whole or not.

        A reply that comes later is refused, so that no client sends what nobody waits for.

        Raises:
            StorageError: the disk refused.
        """
        closed = self._run(run) / "closed" / str(round)
        with storage_errors(closed):
            make_folder(closed.parent)
            closed.touch()
        for kind in ("inbox", "partial"):
            for path in _entries(self._run(run) / kind):
                if path.name.partition(".")[0] == str(round):
                    self._receipts.pop(path, None)
                    self._delete(path)

    def reopen(self, run: str, first: int) -> None:
        """Lets replies of round `first` and later ones in again, and deletes those that came.

        For a run whose newest rounds turned out to be damaged, and are done anew.
        """
        for closed in _entries(self._run(run) / "closed"):
            if int(closed.name) >= first:
                self.forget_round(run, int(closed.name))
                closed.unlink(missing_ok=True)

    def remove_run(self, run: str) -> None:
        """Deletes everything of `run`."""
        path = self._run(run)
        for folder in [key for key in self._receipts if key.is_relative_to(path)]:
            del self._receipts[folder]
        self._delete(path)

    def collect(self, active_runs: Collection[str]) -> None:
        """Deletes all runs but `active_runs`, and what killed processes left half deleted."""
        for path in _entries(self.folder):
            if path.name.startswith(TRASH):
                shutil.rmtree(path, ignore_errors=True)
            elif path.name not in active_runs and RUN.fullmatch(path.name):
                self.remove_run(path.name)

    def used(self) -> int:
        """Bytes of all files in the store."""
        return sum(
            _size(Path(top, name)) for top, _, names in os.walk(self.folder) for name in names
        )

    def _check_room(self, missing: int) -> None:
        promised = missing + sum(upload.missing for upload in self._uploads)
        with storage_errors(self.folder):
            free = shutil.disk_usage(self.folder).free
        if self._max_bytes is not None:
            free = min(free, self._max_bytes - self.used())
        if promised > free:
            raise StorageError(
                f"{self.folder} has room for {max(free, 0)} bytes; uploads need {promised}; free "
                "some space or raise the limit of the store"
            )

    def _ended(self, upload: Upload) -> None:
        with self._lock:
            self._uploads.discard(upload)

    def _place(self, ticket: Ticket) -> UploadPlace:
        return UploadPlace(
            self._run(ticket.run), ticket.round, ticket.attempt, file_stem(ticket.client)
        )

    def _run(self, run: str) -> Path:
        assert RUN.fullmatch(run), f"run is {run!r}"
        return self.folder / run

    def _delete(self, path: Path) -> None:
        # renamed first, so that no process ever sees half of it
        trash = self.folder / f"{TRASH}{secrets.token_hex(8)}"
        try:
            os.rename(path, trash)
        except FileNotFoundError:
            return
        shutil.rmtree(trash, ignore_errors=True)


def _read_receipt(path: Path) -> Receipt:
    try:
        return decode_receipt(path.read_bytes())
    except StorageError as e:
        raise StorageError(
            f"{path}: {e}; delete it and continue with: fedlora resume; its client then sends "
            "its update again"
        ) from e


def _entries(folder: Path) -> Iterator[Path]:
    try:
        yield from sorted(folder.iterdir())
    except FileNotFoundError:
        return


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
