"""Connections that are cut, reset, delayed, repeated or stalled: the right bytes, sent once."""

import hashlib
import random
from collections.abc import Iterator

import pytest

from fedlora.client.exchange import ExchangeClient
from tests.faults.exchange_process import ExchangeProcess
from tests.faults.proxy import Fate, Proxy, cuts, drawn

MIB = 1 << 20
# a connection that breaks loses what is on its way: windows, socket buffers and a chunk
ON_THE_WAY = 6 * MIB
# pings by which a silent connection is noticed
NOTICE = (("grpc.keepalive_time_ms", 1000), ("grpc.keepalive_timeout_ms", 1000))

SEEDS = [*range(3), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(3, 20))]


def drawn_bytes(seed: int) -> bytes:
    return random.Random(seed).randbytes(12 * MIB)


@pytest.fixture(scope="module")
def process(tmp_path_factory):
    with ExchangeProcess(tmp_path_factory.mktemp("exchange")) as made:
        yield made


class Through:
    """A client whose connections go through a proxy."""

    def __init__(self, process: ExchangeProcess, fates: Iterator[Fate], options=()) -> None:
        self.process = process
        self.proxy = Proxy(process.port, fates)
        self.client = ExchangeClient(
            f"127.0.0.1:{self.proxy.port}", None, patience_s=60, options=options
        )

    def up(self, run: str, data: bytes) -> int:
        """Sends; the server must hold exactly these bytes. Gives how many were sent."""
        sent = self.client.send(self.process.ticket(run=run), b"{}", data)
        [receipt] = self.process.store.received(run, 1, 0).values()
        assert self.process.store.payload(run, 1, 0, receipt) == data
        return sent

    def down(self, run: str, data: bytes) -> int:
        """Fetches what is on offer; gives how many bytes passed the proxy."""
        self.process.store.offer(run, data)
        ticket = self.process.ticket("down", run=run)
        digest = hashlib.sha256(data).hexdigest()
        assert self.client.fetch(ticket, digest, len(data)) == data
        return self.proxy.forwarded

    def __enter__(self) -> "Through":
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()
        self.proxy.close()


@pytest.mark.parametrize("way", ["up", "down"])
@pytest.mark.parametrize("seed", SEEDS)
def test_a_cut_at_any_byte_sends_only_the_rest(process, seed, way):
    """Two connections are cut at random bytes; what was held before is not sent again."""
    data = drawn_bytes(seed)
    chance = random.Random(f"{seed} {way}")
    places = [chance.randrange(1, len(data)) for _ in range(2)]
    with Through(process, cuts(*places)) as through:
        moved = getattr(through, way)(f"cut-{way}-{seed}", data)
        assert through.proxy.connections >= 2
    assert moved <= len(data) + len(places) * ON_THE_WAY


@pytest.mark.parametrize("way", ["up", "down"])
@pytest.mark.parametrize("seed", SEEDS)
def test_whatever_happens_to_connections_the_bytes_are_right(process, seed, way):
    """Ends, resets, delays and repeated bytes, five connections in a row."""
    data = drawn_bytes(seed)
    with Through(process, drawn(seed, 5, len(data) // 2)) as through:
        getattr(through, way)(f"drawn-{way}-{seed}", data)
        assert through.proxy.connections >= 2


@pytest.mark.slow
@pytest.mark.parametrize("way", ["up", "down"])
@pytest.mark.parametrize("seed", range(5))
def test_a_connection_that_falls_silent_is_left(process, seed, way):
    data = drawn_bytes(seed)
    place = random.Random(f"{seed} {way}").randrange(MIB, len(data))
    with Through(process, iter([Fate(place, "stall")]), NOTICE) as through:
        getattr(through, way)(f"stall-{way}-{seed}", data)
        assert through.proxy.connections == 2
