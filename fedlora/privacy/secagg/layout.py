"""Fixed layouts: the bytes of a message are cut by lengths that the receiver knows."""

import struct
from collections.abc import Iterable

from fedlora.errors import SecureAggregationError


class Cutter:
    """Cuts the bytes of a message from front to back.

    Args:
        data: the message.
        what: what the message is, as it is told in an error.
        client: whose message it is; empty for the server's.
    """

    def __init__(self, data: bytes, what: str, client: str = "") -> None:
        self._data = data
        self._what = what
        self._client = client
        self._at = 0

    def take(self, size: int) -> bytes:
        """The next `size` bytes.

        Raises:
            SecureAggregationError: there are fewer.
        """
        end = self._at + size
        if end > len(self._data):
            raise self.malformed(f"ends at byte {len(self._data)}; expected {end} or more")
        piece = self._data[self._at : end]
        self._at = end
        return piece

    def number(self, size: int) -> int:
        """The next `size` bytes as an unsigned big-endian number."""
        return int.from_bytes(self.take(size), "big")

    def real(self) -> float:
        """The next eight bytes as a big-endian float64."""
        value: float = struct.unpack(">d", self.take(8))[0]
        return value

    def text(self, most: int) -> str:
        """The next text of at most `most` bytes, after its length.

        Raises:
            SecureAggregationError: longer, or not UTF-8.
        """
        size = self.number(2)
        if size > most:
            raise self.malformed(f"has a text of {size} bytes; expected at most {most}")
        try:
            return self.take(size).decode()
        except UnicodeDecodeError as e:
            raise self.malformed("has a text that is not UTF-8") from e

    def end(self) -> None:
        """Makes sure that nothing is left.

        Raises:
            SecureAggregationError: something is.
        """
        if self._at != len(self._data):
            raise self.malformed(f"has {len(self._data)} bytes; expected {self._at}")

    def malformed(self, why: str) -> SecureAggregationError:
        """The error that says what is wrong with the message."""
        sender = f" of client {self._client!r}" if self._client else ""
        return SecureAggregationError(f"the {self._what}{sender} {why}", self._client)


def text(value: str) -> bytes:
    """A text after its length in two bytes."""
    data = value.encode()
    return len(data).to_bytes(2, "big") + data


def number(value: int, size: int) -> bytes:
    """An unsigned big-endian number."""
    return value.to_bytes(size, "big")


def real(value: float) -> bytes:
    """A big-endian float64."""
    return struct.pack(">d", value)


def members(indices: Iterable[int]) -> bytes:
    """A set of clients as a bit mask of eight bytes; bit i is client i of the session."""
    return number(sum(1 << i for i in set(indices)), 8)


def indices(mask: int) -> tuple[int, ...]:
    """The clients in a bit mask, ascending."""
    return tuple(i for i in range(mask.bit_length()) if mask >> i & 1)
