"""ClientState: what a client keeps for itself between rounds, on its own disk."""

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from torch import Tensor

from fedlora.errors import TrainingError
from fedlora.storage import storage_errors, write_atomic
from fedlora.wire import decode_own, encode_tensors, sha256


class Memory(Protocol):
    """Where a client keeps named tensors from round to round."""

    def before(self, number: int) -> dict[str, Tensor]:
        """What the client's last round before `number` left; empty if none."""
        ...

    def save(self, number: int, tensors: Mapping[str, Tensor]) -> None:
        """Keeps `tensors` as of round `number`."""
        ...


class CarriedState:
    """A client's state that travels with its task, for a client without a disk of its own.

    Args:
        payload: encoded tensors of the client's last round; empty if there was none.

    Attributes:
        saved: encoded tensors of this round; None while there are none.
    """

    def __init__(self, payload: bytes) -> None:
        self.payload = payload
        self.saved: bytes | None = None

    def before(self, number: int) -> dict[str, Tensor]:
        return decode_own(self.payload) if self.payload else {}

    def save(self, number: int, tensors: Mapping[str, Tensor]) -> None:
        self.saved = encode_tensors(tensors)


class ClientState:
    """Named tensors by round: moments, kept factors, control variates, error feedback.

    The newest state older than the current round is used, so that a round that is done
    again after a crash starts from what it started from the first time.

    A file is the SHA-256 of the tensors' bytes, a newline, and those bytes. One that was
    damaged is refused: a client that quietly began anew would end in another result.

    Args:
        folder: named after the client.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def before(self, number: int) -> dict[str, Tensor]:
        """What the client's last round before `number` left; empty if none.

        Raises:
            TrainingError: see `payload_before`.
        """
        payload = self.payload_before(number)
        return decode_own(payload) if payload else {}

    def payload_before(self, number: int) -> bytes:
        """The encoded tensors of the client's last round before `number`; empty if none.

        Raises:
            TrainingError: the file cannot be read, or is not what was written.
        """
        older = [n for n in self._rounds() if n < number]
        if not older:
            return b""
        path = self._path(max(older))
        try:
            digest, _, payload = path.read_bytes().partition(b"\n")
            problem = "" if digest == sha256(payload).encode() else "does not have its digest"
        except OSError as e:
            problem = f"cannot be read ({e.strerror})"
        if problem:
            raise TrainingError(
                f"what client {self.folder.name!r} kept in {path} cannot be used: the file "
                f"{problem}; restore it, or remove it so that the client goes on from an older "
                "one or, without any, from nothing"
            )
        return payload

    def save(self, number: int, tensors: Mapping[str, Tensor]) -> None:
        """Keeps `tensors` as of round `number`; see `save_payload`."""
        self.save_payload(number, encode_tensors(tensors))

    def save_payload(self, number: int, payload: bytes) -> None:
        """Keeps encoded tensors as of round `number` and forgets all but the two states before.

        A client of an asynchronous run may have done two tasks since the last commit.

        Raises:
            StorageError: the disk refused.
        """
        with storage_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        write_atomic(self._path(number), sha256(payload).encode() + b"\n" + payload)
        for old in sorted(n for n in self._rounds() if n < number)[:-2]:
            self._path(old).unlink(missing_ok=True)

    def _rounds(self) -> list[int]:
        return [int(path.stem) for path in self.folder.glob("*.state")]

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:04d}.state"
