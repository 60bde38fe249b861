"""Chunks as the bytes of their messages, without a protobuf object in between.

A chunk is a `bytes` field of up to 1 MiB. Protobuf's runtime copies it twice on each side; here
its tag and length are put before it or cut off it
(https://protobuf.dev/programming-guides/encoding/), so any other implementation of
exchange.proto understands what is sent, and is understood.
"""

from fedlora.protos.exchange_pb2 import DownloadChunk, UploadMessage

UPLOAD_TAG = b"\x12"  # field 2, length-delimited
DOWNLOAD_TAG = b"\x0a"  # field 1


def _framed(tag: bytes, chunk: bytes | memoryview, rest: bytes = b"") -> bytes:
    size, length = len(chunk), bytearray()
    while size > 0x7F:
        length.append(size & 0x7F | 0x80)
        size >>= 7
    length.append(size)
    return b"".join((tag, length, chunk, rest))


def _unframed(tag: bytes, message: bytes) -> memoryview | None:
    """The chunk of a message that consists of it alone, None for any other message."""
    if not message.startswith(tag):
        return None
    size = 0
    # the length of a message in memory has at most five digits to base 128
    for place, digit in enumerate(message[1:6]):
        size |= (digit & 0x7F) << 7 * place
        if digit < 0x80:
            start = place + 2
            return memoryview(message)[start:] if start + size == len(message) else None
    return None


def upload_chunk(chunk: bytes | memoryview) -> bytes:
    """An UploadMessage with `chunk`."""
    return _framed(UPLOAD_TAG, chunk)


def read_upload(message: bytes) -> memoryview | UploadMessage:
    """The chunk in an UploadMessage, or the message if it is no plain chunk.

    Raises:
        google.protobuf.message.DecodeError: not an UploadMessage.
    """
    chunk = _unframed(UPLOAD_TAG, message)
    return UploadMessage.FromString(message) if chunk is None else chunk


def download_chunk(chunk: bytes | memoryview, size_bytes: int = 0) -> bytes:
    """A DownloadChunk; `size_bytes` is that of the whole blob, in the first message."""
    return _framed(DOWNLOAD_TAG, chunk, DownloadChunk(size_bytes=size_bytes).SerializeToString())


def read_download(message: bytes) -> tuple[bytes | memoryview, int]:
    """The chunk in a DownloadChunk, and the size of the blob (0 but in the first message).

    Raises:
        google.protobuf.message.DecodeError: not a DownloadChunk.
    """
    chunk = _unframed(DOWNLOAD_TAG, message)
    if chunk is not None:
        return chunk, 0
    parsed = DownloadChunk.FromString(message)
    return parsed.chunk, parsed.size_bytes
