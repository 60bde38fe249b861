"""ClientState: what a client keeps for itself between rounds, on its own disk."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from fedlora.storage import storage_errors, write_atomic
from fedlora.wire import decode_own, encode_tensors


class ClientState:
    """Named tensors by round: moments, kept factors, control variates.

    The newest state older than the current round is used, so that a round that is done
    again after a crash starts from what it started from the first time.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def before(self, number: int) -> dict[str, Tensor]:
        """What the client's last round before `number` left; empty if none."""
        older = [n for n in self._rounds() if n < number]
        return decode_own(self._path(max(older)).read_bytes()) if older else {}

    def save(self, number: int, tensors: Mapping[str, Tensor]) -> None:
        """Keeps `tensors` as of round `number` and forgets all but the one state before.

        Raises:
            StorageError: the disk refused.
        """
        with storage_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        write_atomic(self._path(number), encode_tensors(tensors))
        for old in sorted(n for n in self._rounds() if n < number)[:-1]:
            self._path(old).unlink(missing_ok=True)

    def _rounds(self) -> list[int]:
        return [int(path.stem) for path in self.folder.glob("*.safetensors")]

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:04d}.safetensors"
