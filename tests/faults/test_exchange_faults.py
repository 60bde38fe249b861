"""The data plane under kills, cuts and hostile callers: honest transfers come through."""

import hashlib
import socket
import threading
from itertools import islice

import grpc
import pytest

from fedlora.client.exchange import ExchangeClient
from fedlora.errors import TransferError
from fedlora.seeds import derive_seed
from fedlora.tickets import METADATA_KEY
from tests.faults.exchange_process import ExchangeProcess
from tests.faults.proxy import Proxy, cuts

MIB = 1 << 20
DATA = bytes(range(256)) * (24 * MIB // 256)
DIGEST = hashlib.sha256(DATA).hexdigest()
# what may be on its way when a connection breaks: windows, socket buffers and a chunk
ON_THE_WAY = 6 * MIB


def connect(port: int, **options) -> ExchangeClient:
    return ExchangeClient(f"127.0.0.1:{port}", None, patience_s=60, **options)


@pytest.fixture(scope="module")
def process(tmp_path_factory):
    with ExchangeProcess(tmp_path_factory.mktemp("exchange")) as made:
        yield made


def test_an_upload_cut_half_way_sends_only_the_rest(process):
    proxy = Proxy(process.port, cuts(len(DATA) // 2))
    client = connect(proxy.port)
    sent = client.send(process.ticket(run="cut-up"), b"{}", DATA)
    [receipt] = process.store.received("cut-up", 1, 0).values()
    assert process.store.payload("cut-up", 1, 0, receipt) == DATA
    assert proxy.connections == 2
    assert sent <= len(DATA) + ON_THE_WAY
    client.close()
    proxy.close()


def test_a_download_cut_again_and_again_arrives(process):
    process.store.offer("cut-down", DATA)
    proxy = Proxy(process.port, cuts(len(DATA) // 2, 3 * MIB, 3 * MIB, 100_000))
    client = connect(proxy.port)
    assert client.fetch(process.ticket("down", run="cut-down"), DIGEST, len(DATA)) == DATA
    assert proxy.connections == 5
    assert proxy.forwarded <= len(DATA) + 4 * ON_THE_WAY
    client.close()
    proxy.close()


class Murderer:
    """Kills the exchange when so many bytes of an upload are on its disk, and restarts it."""

    def __init__(self, process: ExchangeProcess, run: str, places: list[int]) -> None:
        self._process = process
        self._folder = process.folder / "store" / run / "partial"
        self._places = places
        self.kills = 0
        self._thread = threading.Thread(target=self._work)
        self._thread.start()

    def _work(self) -> None:
        for place in self._places:
            while sum(path.stat().st_size for path in self._uploads()) < place:
                pass
            self._process.kill()
            self.kills += 1
            self._process.start()

    def _uploads(self):
        return self._folder.glob("*/site-0.*")

    def join(self) -> None:
        self._thread.join(60)


def test_a_killed_exchange_goes_on_where_its_disk_stands(tmp_path):
    places = sorted(derive_seed(seed, "kill") % (len(DATA) - 6 * MIB) for seed in range(3))
    with ExchangeProcess(tmp_path) as process:
        murderer = Murderer(process, "run", places)
        client = connect(process.port)
        sent = client.send(process.ticket(), b"{}", DATA)
        murderer.join()
        assert murderer.kills == len(places)
        [receipt] = process.store.received("run", 1, 0).values()
        assert process.store.payload("run", 1, 0, receipt) == DATA
        assert sent <= len(DATA) + len(places) * ON_THE_WAY
        client.close()


@pytest.mark.slow
def test_more_bytes_than_one_message_may_have_go_up_in_pieces(process, tmp_path):
    """2.1 GiB of a file with holes, cut beyond the two gigabytes of one protobuf message."""
    path = tmp_path / "delta"
    size = 21 * 1024 * MIB // 10
    with path.open("wb") as file:
        file.truncate(size)
        for place in range(0, size, 100 * MIB):
            file.seek(place)
            file.write(place.to_bytes(8, "little"))
    before = process.status_bytes("VmRSS")
    process.forget_peak()
    proxy = Proxy(process.port, cuts(size // 2, (1 << 31) + MIB - size // 2))
    client = connect(proxy.port)
    sent = client.send(process.ticket(run="large", max_bytes=1 << 32), b"{}", path)
    [receipt] = process.store.received("large", 1, 0).values()
    with path.open("rb") as file:
        expected = hashlib.file_digest(file, "sha256").hexdigest()
    assert (receipt.size_bytes, receipt.sha256) == (size, expected)
    assert proxy.connections == 3
    assert sent <= size + 2 * ON_THE_WAY
    assert process.status_bytes("VmHWM") - before < 160 * MIB
    client.close()
    proxy.close()
    process.store.remove_run("large")


def flood(process, ticket: str | None, size: int):
    """`size` bytes of chunks after a header, with and without a ticket."""
    from fedlora.protos.exchange_pb2 import UploadHeader, UploadMessage
    from fedlora.protos.frames import upload_chunk

    def body():
        header = UploadHeader(sha256=DIGEST, size_bytes=1000)
        yield UploadMessage(header=header).SerializeToString()
        yield from islice(iter(lambda: upload_chunk(bytes(MIB)), None), size // MIB)

    with grpc.insecure_channel(f"127.0.0.1:{process.port}") as channel:
        call = channel.stream_unary("/fedlora.v1.DeltaExchange/Upload")
        with pytest.raises(grpc.RpcError) as refused:
            call(body(), metadata=() if ticket is None else ((METADATA_KEY, ticket),))
    return refused.value.code()


def oversized(process, method: str, size: int, compression=grpc.Compression.NoCompression):
    """One message of `size` bytes."""
    with grpc.insecure_channel(f"127.0.0.1:{process.port}") as channel:
        call = channel.unary_unary(method)
        metadata = ((METADATA_KEY, process.ticket()),)
        with pytest.raises(grpc.RpcError) as refused:
            call(bytes(size), metadata=metadata, compression=compression)
    return refused.value.code()


def raw(process, begin: bytes, size: int) -> None:
    """`begin` and then zeros on a bare socket, until the server hangs up or takes no more."""
    with socket.create_connection(("127.0.0.1", process.port), timeout=2) as connection:
        try:
            connection.sendall(begin)
            for _ in range(size // MIB):
                connection.sendall(bytes(MIB))
        except OSError:
            return


def test_hostile_bodies_do_not_grow_the_server_and_an_honest_upload_completes(process):
    """200 MB each way of doing it wrong, while an honest client sends."""
    size = 200 * MIB
    # warm, so that what is measured is not the first use of anything
    warm = connect(process.port)
    warm.send(process.ticket(run="warm"), b"{}", DATA)
    warm.close()
    before = process.status_bytes("VmRSS")
    process.forget_peak()
    honest: list[int] = []
    client = connect(process.port)
    sending = threading.Thread(
        target=lambda: honest.append(client.send(process.ticket(run="honest"), b"{}", DATA))
    )
    sending.start()
    codes = grpc.StatusCode
    assert flood(process, None, size) == codes.UNAUTHENTICATED
    assert flood(process, "x" * 2000, size) == codes.UNAUTHENTICATED
    assert flood(process, process.ticket(run="flood"), size) == codes.INVALID_ARGUMENT
    upload, stat = "/fedlora.v1.DeltaExchange/Upload", "/fedlora.v1.DeltaExchange/Stat"
    assert oversized(process, upload, size) == codes.RESOURCE_EXHAUSTED
    assert oversized(process, stat, size) == codes.RESOURCE_EXHAUSTED
    assert oversized(process, "/fedlora.v1.DeltaExchange/None", size) == codes.UNIMPLEMENTED
    # zeros, which compress to a thousandth
    for method in (upload, stat):
        bomb = oversized(process, method, size, grpc.Compression.Gzip)
        assert bomb == codes.RESOURCE_EXHAUSTED
    raw(process, b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 209715200\r\n\r\n", size)
    # HTTP/2 preface, then a frame that announces 16 MiB
    raw(process, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\xff\xff\xff\x00\x00\x00\x00\x00\x01", size)
    sending.join(60)
    client.close()
    grown = process.status_bytes("VmHWM") - before
    assert honest == [len(DATA)]
    assert grown < 64 * MIB, f"{grown / MIB:.0f} MiB"


def test_many_silent_callers_do_not_keep_an_honest_one_out(process):
    """Opened connections and calls that never send a word."""
    sockets = [socket.create_connection(("127.0.0.1", process.port)) for _ in range(100)]
    release = threading.Event()

    def silence():
        release.wait()
        yield b""

    with grpc.insecure_channel(f"127.0.0.1:{process.port}") as channel:
        upload = channel.stream_unary("/fedlora.v1.DeltaExchange/Upload")
        calls = [upload.future(silence()) for _ in range(100)]
        client = connect(process.port)
        assert client.send(process.ticket(run="silent"), b"{}", b"abc") >= 3
        release.set()
        for call in calls:
            # no ticket, no place; a busy server does not even look at some of them
            refused = (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.UNAVAILABLE)
            assert call.code() in refused
        client.close()
    for opened in sockets:
        opened.close()


def test_giving_up_says_what_was_tried_and_why():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    waits: list[float] = []
    now = [0.0]

    def wait(seconds: float) -> None:
        waits.append(seconds)
        now[0] += seconds

    client = connect(port, wait=wait, clock=lambda: now[0])
    with pytest.raises(TransferError, match="nothing listens there") as caught:
        client.send("ticket", b"{}", b"abc")
    assert f"127.0.0.1:{port}" in str(caught.value)
    assert "60 s without progress" in str(caught.value)
    assert caught.value.exit_code == 3
    # doubling up to a cap, and not a second longer than the patience
    assert waits[:8] == [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0]
    assert sum(waits) == pytest.approx(60)
    client.close()
