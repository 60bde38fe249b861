"""Parts: what a client has fetched of broadcasts, on its disk."""

from collections.abc import Collection
from pathlib import Path

from fedlora.storage import storage_errors
from fedlora.wire import sha256


class Parts:
    """Parts of one run's broadcasts by digest.

    They can be fetched again, so they are not synced; what was damaged counts as missing.

    Args:
        folder: made when it is first needed.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def find(self, digest: str) -> bytes | None:
        """The part, if it is here."""
        try:
            data = (self.folder / digest).read_bytes()
        except OSError:
            return None
        return data if sha256(data) == digest else None

    def keep(self, digest: str, data: bytes) -> None:
        """Takes in a part.

        Raises:
            StorageError: the disk refused.
        """
        with storage_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            (self.folder / digest).write_bytes(data)

    def prune(self, needed: Collection[str]) -> None:
        """Forgets all parts but those."""
        for path in self.folder.glob("*"):
            if path.name not in needed:
                path.unlink(missing_ok=True)
