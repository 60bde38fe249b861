"""Outbox: updates that were made and are not yet known to have arrived."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from fedlora.errors import AdapterError
from fedlora.storage import sealed, storage_errors, unsealed, write_atomic
from fedlora.wire import decode_update_manifest

KEPT = 8


@dataclass(frozen=True)
class Kept:
    """An update on disk.

    Attributes:
        manifest: of the update.
        payload: file of its tensors.
    """

    manifest: bytes
    payload: Path


class Outbox:
    """Updates by the SHA-256 of the broadcast manifest that they answer.

    An update exists when its manifest does, which is written last, under its digest; whole or not
    at all.

    Args:
        folder: made when it is first needed.
        most: so many newest updates are kept.
    """

    def __init__(self, folder: Path, most: int = KEPT) -> None:
        self.folder = folder
        self.most = most

    def __len__(self) -> int:
        return len(self._keys())

    def keep(self, key: str, manifest: bytes, payload: bytes) -> Kept:
        """Writes an update and syncs it; the oldest ones go.

        Raises:
            StorageError: the disk refused.
        """
        with storage_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        kept = Kept(manifest, self._payload(key))
        write_atomic(kept.payload, payload)
        write_atomic(self._manifest(key), sealed(manifest))
        self.drop(self._keys()[: -self.most])
        return kept

    def find(self, key: str) -> Kept | None:
        """The update under `key`; None when there is none, or it was damaged on disk."""
        try:
            manifest = unsealed(self._manifest(key).read_bytes())
            with self._payload(key).open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if decode_update_manifest(manifest)["sha256"] == found:
                return Kept(manifest, self._payload(key))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, AdapterError):
            pass
        # it can be made again
        self.drop([key])
        return None

    def drop(self, keys: Iterable[str]) -> None:
        """Forgets updates; a key that is not known is passed over."""
        for key in keys:
            self._manifest(key).unlink(missing_ok=True)
            self._payload(key).unlink(missing_ok=True)

    def _keys(self) -> list[str]:
        """Of all updates, the oldest first."""
        found = [(path.stat().st_mtime_ns, path.stem) for path in self.folder.glob("*.json")]
        return [key for _, key in sorted(found)]

    def _manifest(self, key: str) -> Path:
        return self.folder / f"{key}.json"

    def _payload(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"
