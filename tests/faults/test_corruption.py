"""One flipped bit anywhere in what a run keeps: always noticed, and mended to the same bits."""

import random
import shutil
from pathlib import Path

import pytest

from fedlora.checkpoint import RunStore
from fedlora.client.outbox import Outbox
from fedlora.errors import StorageError
from fedlora.server.blob_store import BlobStore
from fedlora.server.receipts import Receipt, decode_receipt, encode_receipt
from fedlora.wire import sha256
from tests.server.cases import encoded, expectation, honest
from tests.server.toy import Run

NEWEST = ("HEAD", "rounds/0003/round.json", "rounds/0003/global.safetensors")
TIMES = [10, pytest.param(200, marks=pytest.mark.slow)]


def flip(path: Path, chance: random.Random) -> None:
    """One random bit of a file."""
    data = bytearray(path.read_bytes())
    data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    path.write_bytes(bytes(data))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of three rounds, closed, its folder and its adapters."""
    run = Run(tmp_path_factory.mktemp("finished") / "run")
    run.go()
    run.store.close()
    return run, run.store.folder, [event["adapter_sha256"] for event in run.rounds()]


@pytest.mark.parametrize("name", NEWEST)
@pytest.mark.parametrize("times", TIMES)
def test_a_flipped_bit_of_a_checkpoint_costs_one_round_at_most(finished, tmp_path, name, times):
    """Noticed every time; the run goes back one version, and comes to the same adapter."""
    run, folder, adapters = finished
    chance = random.Random(name)
    for time in range(times):
        copy = tmp_path / str(time)
        shutil.copytree(folder, copy)
        flip(copy / name, chance)
        run.store = RunStore.open(copy, "job")
        committed = run.store.load()
        # without its head the newest intact round is found; without a file of it, the one before
        assert committed.round == (3 if name == "HEAD" else 2)
        assert f"continuing from round {committed.round}" in run.store.fallback
        run.events.clear()
        run.go()
        again = [event["adapter_sha256"] for event in run.rounds()]
        assert again == adapters[committed.round :]
        assert (copy / NEWEST[2]).read_bytes() == (folder / NEWEST[2]).read_bytes()
        run.store.close()
        shutil.rmtree(copy)


@pytest.mark.parametrize("suffix", [".json", ".safetensors"])
@pytest.mark.parametrize("times", TIMES)
def test_a_flipped_bit_of_a_kept_update_is_never_sent(tmp_path, suffix, times):
    """The client makes the update again instead."""
    chance = random.Random(suffix)
    outbox = Outbox(tmp_path)
    manifest, payload = encoded(honest(expectation()))
    for _ in range(times):
        kept = outbox.keep("key", manifest, payload)
        flip(kept.payload.with_suffix(suffix), chance)
        assert outbox.find("key") is None


@pytest.mark.parametrize("times", TIMES)
def test_a_flipped_bit_of_a_receipt_is_noticed(times):
    chance = random.Random(0)
    manifest, payload = encoded(honest(expectation()))
    receipt = Receipt("ann", 7, sha256(payload), len(payload), manifest, 12)
    for _ in range(times):
        data = bytearray(encode_receipt(receipt))
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        with pytest.raises(StorageError):
            decode_receipt(bytes(data))


@pytest.mark.parametrize("times", TIMES)
def test_a_flipped_bit_of_a_received_payload_is_noticed(tmp_path, times):
    chance = random.Random(0)
    store = BlobStore(tmp_path)
    manifest, payload = encoded(honest(expectation()))
    folder = tmp_path / "run" / "inbox" / "1.0"
    folder.mkdir(parents=True)
    receipt = Receipt("ann", 7, sha256(payload), len(payload), manifest)
    path = folder / f"ann.{receipt.sha256}"
    for _ in range(times):
        path.write_bytes(payload)
        assert store.payload("run", 1, 0, receipt) == payload
        flip(path, chance)
        with pytest.raises(StorageError, match="does not hold what was received"):
            store.payload("run", 1, 0, receipt)
