"""Chunks by hand are the bytes of protobuf's own messages, and read as protobuf reads them."""

import pytest
from google.protobuf.message import DecodeError
from hypothesis import example, given
from hypothesis import strategies as st

from fedlora.protos.exchange_pb2 import DownloadChunk, UploadHeader, UploadMessage
from fedlora.protos.frames import download_chunk, read_download, read_upload, upload_chunk

chunks = st.binary(max_size=300) | st.sampled_from([127, 128, 16383, 16384, 1 << 20]).map(bytes)


@given(chunks)
def test_an_upload_chunk_is_protobufs_message(chunk):
    message = upload_chunk(memoryview(chunk))
    assert message == UploadMessage(chunk=chunk).SerializeToString()
    assert bytes(read_upload(message)) == chunk


@given(chunks, st.integers(0, 2**64 - 1))
def test_a_download_chunk_says_to_protobuf_what_it_says_to_us(chunk, size):
    message = download_chunk(chunk, size)
    assert DownloadChunk.FromString(message) == DownloadChunk(chunk=chunk, size_bytes=size)
    for written in (message, DownloadChunk(chunk=chunk, size_bytes=size).SerializeToString()):
        found, found_size = read_download(written)
        assert (bytes(found), found_size) == (chunk, size)


hostile = st.binary(max_size=40) | st.builds(
    lambda tag, length, rest: tag + length + rest,
    st.sampled_from([b"\x12", b"\x0a"]),
    st.binary(max_size=8),
    st.binary(max_size=40),
)


@given(hostile)
@example(b"\x12")
@example(b"\x12\x81\x00x")  # a length with a needless digit
@example(b"\x12\x01a\x12\x01b")  # the last of two chunks counts
def test_any_bytes_are_read_as_protobuf_reads_them(message):
    try:
        expected = UploadMessage.FromString(message)
    except DecodeError:
        with pytest.raises(DecodeError):
            read_upload(message)
    else:
        found = read_upload(message)
        assert (found if isinstance(found, UploadMessage) else bytes(found)) == (
            expected if isinstance(found, UploadMessage) else expected.chunk
        )
    try:
        chunk = DownloadChunk.FromString(message)
    except DecodeError:
        with pytest.raises(DecodeError):
            read_download(message)
    else:
        found, size = read_download(message)
        assert (bytes(found), size) == (chunk.chunk, chunk.size_bytes)


def test_a_header_is_no_chunk():
    header = UploadMessage(header=UploadHeader(sha256="0" * 64, size_bytes=1))
    assert read_upload(header.SerializeToString()) == header
