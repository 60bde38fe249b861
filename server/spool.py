"""Spool: the updates of one round on disk, so that memory does not grow with clients."""

import os
from pathlib import Path

import torch

from fedlora.errors import StorageError
from fedlora.messages import LazyTensors
from fedlora.storage import storage_errors
from fedlora.wire import Shapes, layout


class Spool:
    """Admitted payloads (float32, canonical) in one scratch file; read as often as needed.

    Not durable on purpose: a round that was not committed is done again.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with storage_errors(path):
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        self._slots: dict[str, tuple[int, int]] = {}
        self._end = 0

    def add(self, client: str, payload: bytes) -> None:
        """Stores the payload of `client`.

        Raises:
            StorageError: the disk refused.
        """
        written = 0
        with storage_errors(self.path):
            while written < len(payload):
                written += os.pwrite(self._descriptor, payload[written:], self._end + written)
        self._slots[client] = (self._end, len(payload))
        self._end += len(payload)

    def clients(self) -> list[str]:
        """Names of the stored clients, sorted: the order of every sum."""
        return sorted(self._slots)

    def tensors(self, client: str, shapes: Shapes) -> LazyTensors:
        """The tensors of one client, each read from the file when it is asked for."""
        offset, _ = self._slots[client]
        slots = layout(shapes).slots

        def read(name: str) -> torch.Tensor:
            slot = slots[name]
            if slot.start == slot.end:
                return torch.empty(slot.shape, dtype=slot.dtype)
            data = bytearray(self._read(offset + slot.start, slot.end - slot.start))
            return torch.frombuffer(data, dtype=slot.dtype).reshape(slot.shape)

        return LazyTensors(shapes, read)

    def close(self) -> None:
        """Deletes the file."""
        os.close(self._descriptor)
        self.path.unlink(missing_ok=True)

    def _read(self, offset: int, size: int) -> bytes:
        data = os.pread(self._descriptor, size, offset)
        while len(data) < size:
            more = os.pread(self._descriptor, size - len(data), offset + len(data))
            if not more:
                raise StorageError(f"{self.path} was cut short by somebody else")
            data += more
        return data
