"""Blobs on their way: one that comes in pieces, and one that is sent in pieces."""

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

CHUNK_BYTES = 1 << 20


class DamagedBlob(Exception):
    """The bytes that came are not the blob; they must be fetched again from the start."""


class IncomingBlob:
    """A blob that comes in order, with breaks between.

    Args:
        sha256: of the whole blob.
        announced: its bytes; None until the server says.
        accept: is asked with the server's number of bytes before any is kept; raises what the
            caller of `add` shall have if they are too many.

    Attributes:
        size: bytes that have come.
        checked: everything is here and has the digest.
    """

    def __init__(
        self,
        sha256: str,
        announced: int | None,
        accept: Callable[[int], None] = lambda size_bytes: None,
    ) -> None:
        self.sha256 = sha256
        self.announced = announced
        self.accept = accept
        self.size = 0
        self.checked = False
        self._digest = hashlib.sha256()
        self._chunks: list[bytes | memoryview] = []

    def add(self, chunk: bytes | memoryview, size_bytes: int) -> None:
        """The next bytes; `size_bytes` is what the server says of the whole, 0 for nothing.

        Raises:
            DamagedBlob: the server has another size in mind, or sends more.
        """
        if self.announced is None:
            self.accept(size_bytes)
            self.announced = size_bytes
        if size_bytes not in (0, self.announced):
            raise DamagedBlob(f"it has {size_bytes} bytes at the server, not {self.announced}")
        self.size += len(chunk)
        if self.size > self.announced:
            raise DamagedBlob(f"more than its {self.announced} bytes came")
        self._digest.update(chunk)
        self._chunks.append(chunk)

    def check(self) -> None:
        """To be called when the server has sent everything.

        Raises:
            DamagedBlob: bytes are missing, or are others than the digest says.
        """
        if self.size != self.announced:
            raise DamagedBlob(f"{self.size} of {self.announced} bytes came")
        if self._digest.hexdigest() != self.sha256:
            raise DamagedBlob(f"its bytes have SHA-256 {self._digest.hexdigest()}")
        self.checked = True

    def data(self) -> bytes:
        """The blob."""
        assert self.checked
        return b"".join(self._chunks)


class Outgoing:
    """Bytes or a file to send; a context manager that keeps the file open.

    Attributes:
        sha256, size_bytes: of the whole.
    """

    def __init__(self, payload: bytes | Path) -> None:
        self._file: BinaryIO | None = None
        self._data = memoryview(b"")
        if isinstance(payload, Path):
            self._file = payload.open("rb", buffering=0)
            self.size_bytes = self._file.seek(0, 2)
            digest = hashlib.sha256()
            for chunk in self.chunks(0):
                digest.update(chunk)
            self.sha256 = digest.hexdigest()
        else:
            self._data = memoryview(payload)
            self.size_bytes = len(payload)
            self.sha256 = hashlib.sha256(payload).hexdigest()

    def chunks(self, offset: int) -> Iterator[bytes | memoryview]:
        """The bytes from `offset` on, at most 1 MiB at once."""
        if self._file is None:
            for start in range(offset, self.size_bytes, CHUNK_BYTES):
                yield self._data[start : start + CHUNK_BYTES]
            return
        self._file.seek(offset)
        while chunk := self._file.read(CHUNK_BYTES):
            yield chunk

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._file is not None:
            self._file.close()
