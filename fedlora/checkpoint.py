"""RunStore: a run folder whose rounds are committed atomically and can be resumed.

    job.toml                       the resolved job
    HEAD                           the last committed round, its digest, a checksum
    rounds/0003/global.safetensors the strategy's tensors
    rounds/0003/round.json         what happened in the round, and digests of the above
    given-up.json                  attempts at a round that ended the run below its quorum

A round exists if and only if HEAD, or the chain of digests from HEAD, names it. Commit
writes every file to a temporary name, syncs it, renames it, syncs the folder, and replaces
HEAD last. A file that does not match its digest is never loaded: the store falls back one
version and says so.
"""

import fcntl
import json
import os
import secrets
import shutil
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedlora.adapter import Tensors
from fedlora.errors import AdapterError, RunFolderError
from fedlora.storage import file_above, storage_errors, sync_folder, write_atomic
from fedlora.wire import decode_own, encode_json, encode_tensors, sha256

GIVEN_UP = "given-up.json"


@dataclass(frozen=True)
class Committed:
    """One committed round: the strategy's state and the record of what happened."""

    round: int
    tensors: Tensors
    record: Mapping[str, Any]


class RunStore:
    """An open, locked run folder. Use `create` or `open`."""

    def __init__(self, folder: Path, lock: int | None, job_digest: str | None = None) -> None:
        self.folder = folder
        self._lock = lock
        self._job_digest = job_digest
        self.fallback: str | None = None

    @classmethod
    def create(
        cls,
        folder: Path,
        job_toml: str,
        job_digest: str,
        tensors: Tensors,
        record: Mapping[str, Any],
        files: Mapping[str, bytes] | None = None,
    ) -> "RunStore":
        """A new run folder with round 0; it appears whole, by rename.

        Args:
            folder: must not exist, or be an empty folder.
            job_toml: text of the resolved job.
            job_digest: its digest; `open` refuses another job.
            tensors: the state before round 1.
            record: JSON value of round 0.
            files: further files of the folder, by name.

        Raises:
            RunFolderError: the folder is not empty, or lies below a file.
            StorageError: the disk refused.
        """
        folder = folder.absolute()
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise RunFolderError(
                f"output folder {folder} exists and is not empty; choose another --out, or "
                f"continue the run in it with: fedlora resume {folder}"
            )
        if above := file_above(folder):
            raise RunFolderError(f"output folder {folder}: {above} is a file; choose another --out")
        with storage_errors(folder):
            folder.parent.mkdir(parents=True, exist_ok=True)
            staging = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}")
            staging.mkdir()
        try:
            store = cls(staging, _lock(staging), job_digest)
            write_atomic(staging / "job.toml", job_toml.encode())
            for name, data in (files or {}).items():
                write_atomic(staging / name, data)
            store.commit(0, tensors, record)
            with storage_errors(folder):
                if folder.exists():
                    folder.rmdir()
                os.rename(staging, folder)
                sync_folder(folder.parent)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
        store.folder = folder
        return store

    @classmethod
    def open(cls, folder: Path, job_digest: str, *, locked: bool = True) -> "RunStore":
        """An existing run folder, locked.

        Args:
            folder: as written by `create`.
            job_digest: digest of the job in it, as it is now.
            locked: False only reads, also while another process runs.

        Raises:
            RunFolderError: not a run folder, or in use by another process.
        """
        if not (folder / "HEAD").is_file() or not (folder / "job.toml").is_file():
            raise RunFolderError(
                f"{folder} is not a run folder (no HEAD and job.toml in it); give the folder "
                "that fedlora simulate wrote"
            )
        return cls(folder, _lock(folder) if locked else None, job_digest)

    def close(self) -> None:
        """Releases the lock."""
        if self._lock is not None:
            os.close(self._lock)

    def commit(self, number: int, tensors: Tensors, record: Mapping[str, Any]) -> None:
        """Makes round `number` the head; afterwards it survives a crash.

        Raises:
            StorageError: the disk refused; the former head stands.
        """
        target = self.folder / "rounds" / f"{number:04d}"
        with storage_errors(target):
            target.mkdir(parents=True, exist_ok=True)
            sync_folder(target.parent)
        payload = encode_tensors(tensors)
        write_atomic(target / "global.safetensors", payload)
        entry = {
            **record,
            "round": number,
            "job_digest": self._job_digest,
            "tensors_sha256": sha256(payload),
            "previous": self._digest(number - 1),
        }
        text = encode_json({**entry, "entry_sha256": sha256(encode_json(entry))})
        write_atomic(target / "round.json", text)
        write_atomic(self.folder / "HEAD", _head_bytes(number, sha256(text)))

    def give_up(self, number: int, attempts: int) -> None:
        """Keeps that round `number` had so many attempts, none of which reached its quorum.

        Raises:
            StorageError: the disk refused.
        """
        write_atomic(self.folder / GIVEN_UP, encode_json({"round": number, "attempts": attempts}))

    def first_attempt(self, number: int) -> int:
        """The number of the next attempt at round `number`, after those that were given up."""
        try:
            kept = json.loads((self.folder / GIVEN_UP).read_bytes())
            return int(kept["attempts"]) if kept["round"] == number else 0
        except (OSError, ValueError, TypeError, KeyError):
            return 0

    def load(self) -> Committed:
        """The last committed round whose files match their digests.

        `fallback` then says why it is not the newest, or is None.

        Raises:
            RunFolderError: no committed round is intact.
        """
        self.fallback = None
        number, digest = self._read_head()
        problems = [] if digest else ["HEAD is damaged"]
        while True:
            try:
                committed = self._read(number, digest)
            except RunFolderError as e:
                problems.append(str(e))
                number, digest = self._version_before(number)
                if number < 0:
                    raise RunFolderError("; ".join(problems)) from e
                continue
            if committed.record.get("job_digest") != self._job_digest:
                raise RunFolderError(
                    f"{self.folder / 'job.toml'} is not the job that this run was started with; "
                    "restore it, or start a new run with: fedlora simulate"
                )
            if problems:
                self.fallback = f"{'; '.join(problems)}; continuing from round {committed.round}"
            return committed

    def load_round(self, number: int) -> Committed:
        """Round `number`, which may be an older one.

        Raises:
            RunFolderError: it is not kept, or not intact.
        """
        return self._read(number, self._digest(number))

    def record(self, number: int) -> dict[str, Any] | None:
        """The record of round `number`, or None when it is not kept or not intact."""
        try:
            value = _intact(self._round_json(number).read_bytes())
        except (OSError, ValueError):
            return None
        return value if value.get("round") == number else None

    def prune(self, head: int, keep: int, every: int) -> None:
        """Deletes the tensors of old rounds but the last `keep` and each `every`-th.

        Records stay: they are small, and the metrics can be rebuilt from them.
        """
        for number in range(1, head - keep + 1):
            if number % every:
                path = self.folder / "rounds" / f"{number:04d}" / "global.safetensors"
                path.unlink(missing_ok=True)

    def _read(self, number: int, digest: str | None) -> Committed:
        folder = self.folder / "rounds" / f"{number:04d}"
        try:
            text = (folder / "round.json").read_bytes()
            payload = (folder / "global.safetensors").read_bytes()
        except OSError as e:
            raise RunFolderError(f"round {number} cannot be read ({e.strerror})") from e
        if digest is not None and sha256(text) != digest:
            raise RunFolderError(f"round {number}: round.json fails its digest")
        try:
            record = _intact(text)
            if sha256(payload) != record["tensors_sha256"]:
                raise RunFolderError(f"round {number}: global.safetensors fails its digest")
            return Committed(number, decode_own(payload), record)
        except (ValueError, KeyError, TypeError, AdapterError) as e:
            raise RunFolderError(f"round {number} is not readable: {e}") from e

    def _version_before(self, number: int) -> tuple[int, str | None]:
        """The next older round with tensors, and the digest its successor names, if any."""
        for older in range(number - 1, -1, -1):
            if (self.folder / "rounds" / f"{older:04d}" / "global.safetensors").is_file():
                successor = self.record(older + 1)
                return older, successor.get("previous") if successor else None
        return -1, None

    def _digest(self, number: int) -> str | None:
        # not what HEAD names: that may be a later, damaged round
        try:
            return sha256(self._round_json(number).read_bytes())
        except OSError:
            return None

    def _round_json(self, number: int) -> Path:
        return self.folder / "rounds" / f"{number:04d}" / "round.json"

    def _read_head(self) -> tuple[int, str | None]:
        """The round HEAD names, and its digest; the digest is None if HEAD is damaged."""
        try:
            data = (self.folder / "HEAD").read_bytes()
            fields = data.decode("ascii").split()
            number, digest = int(fields[0]), fields[1]
            if _head_bytes(number, digest) != data:
                raise ValueError("checksum")
        except (OSError, ValueError, IndexError):
            # the newest intact round stands in for it
            names = [p.name for p in (self.folder / "rounds").glob("[0-9]*")]
            return max((int(name) for name in names if name.isdigit()), default=-1), None
        return number, digest


def _intact(text: bytes) -> dict[str, Any]:
    """The record in a round.json; ValueError when it is not what was written."""
    record = json.loads(text)
    own = record.pop("entry_sha256", None) if isinstance(record, dict) else None
    if own is None or sha256(encode_json(record)) != own:
        raise ValueError("round.json fails its own digest")
    assert isinstance(record, dict)
    return record


def _head_bytes(number: int, digest: str) -> bytes:
    text = f"{number} {digest}"
    return f"{text} {zlib.crc32(text.encode()):08x}\n".encode()


def _lock(folder: Path) -> int:
    with storage_errors(folder):
        descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
        os.close(descriptor)
        raise RunFolderError(
            f"run folder {folder} is in use by another process; wait for it or stop it"
        ) from e
    return descriptor
