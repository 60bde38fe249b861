"""A disk that is full at a random byte: nothing looks whole that is not, and all is well after.

A real file system of a few megabytes, so that short writes, metadata and clean-up meet what a
kernel does; the tests of each part walk every single write with a shim.
"""

import os
import random
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fedlora.checkpoint import RunStore
from fedlora.client.outbox import Outbox
from fedlora.errors import StorageError, UploadRefused
from fedlora.server.blob_store import BlobStore
from fedlora.server.metrics import MetricsLog
from fedlora.tickets import Ticket
from fedlora.wire import sha256
from tests.faults.crash import ROUNDS, create, drive
from tests.server.cases import encoded, expectation, honest
from tests.server.toy import Run

MIB = 1 << 20
SIZE = 24 * MIB
SEEDS = [*range(3), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(3, 20))]


class Disk:
    """A file system of its own, filled up on demand.

    Attributes:
        path: where it is.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._ballast = path / "ballast"

    def leave(self, free_bytes: int) -> None:
        """Fills it up, but for so many bytes (in whole pages)."""
        found = os.statvfs(self.path)
        taken = found.f_bavail * found.f_bsize - free_bytes
        with self._ballast.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, max(taken, 1))

    def clear(self) -> None:
        """Gives the space back."""
        self._ballast.unlink(missing_ok=True)

    def drafts(self) -> list[Path]:
        """Files that were begun and never got their name."""
        return [path for path in self.path.rglob("*") if path.name.endswith(".tmp")]


@pytest.fixture
def disk(tmp_path):
    path = tmp_path / "disk"
    path.mkdir()
    options = ["-t", "tmpfs", "-o", f"size={SIZE}", "none", str(path)]
    mounted = subprocess.run(["mount", *options], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("a file system of its own needs the right to mount one")
    yield Disk(path)
    subprocess.run(["umount", "--lazy", str(path)], check=True)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    create(folder / "run", RunStore)
    return drive(folder / "run", RunStore, folder / "acknowledged")


@pytest.mark.parametrize("seed", SEEDS)
def test_a_run_on_a_full_disk_stops_and_goes_on_once_there_is_space(
    disk, tmp_path, undisturbed, seed
):
    """The spool, the tensors, the record or HEAD does not fit; 2 MB of factors, 3 clients."""
    chance = random.Random(seed)
    folder, acknowledged = disk.path / "run", tmp_path / "acknowledged"
    create(folder, RunStore)
    acknowledged.touch()
    stops: list[str] = []
    # three times, the disk is full at another byte
    for _ in range(3):
        disk.leave(chance.randrange(12 * MIB))
        try:
            drive(folder, RunStore, acknowledged)
        except StorageError as e:
            stops.append(str(e))
        assert not disk.drafts()
        assert not (folder / "spool.bin").exists()
        store = RunStore.open(folder, "digest")
        standing = store.load()
        assert store.fallback is None
        store.close()
        done = [int(line.split()[0]) for line in acknowledged.read_text().splitlines()]
        assert done == list(range(1, standing.round + 1))
        disk.clear()
    assert stops
    assert all("No space left on device" in why and str(folder) in why for why in stops)
    last = drive(folder, RunStore, acknowledged)
    assert last in (undisturbed, "")
    final = acknowledged.read_text().splitlines()
    assert [int(line.split()[0]) for line in final] == list(range(1, ROUNDS + 1))
    assert final[-1].split()[1] == undisturbed


def append_all(upload, data: bytes) -> None:
    for start in range(0, len(data), 100_000):
        upload.append(data[start : start + 100_000])
    upload.finish()


@pytest.mark.parametrize("seed", SEEDS)
def test_an_upload_to_a_full_disk_is_continued(disk, seed):
    """Payload or receipt does not fit; what came stays, and only the rest is sent again."""
    chance = random.Random(seed)
    data = chance.randbytes(2 * MIB)
    store = BlobStore(disk.path / "store")
    ticket = Ticket("run", 1, 0, "ann", 7, "up", 1 << 30, 0.0)
    announced = (sha256(data), len(data))
    # as the client announces it before the disk fills up: room is checked when it begins
    with store.begin_upload(ticket, *announced, 0, b"{}") as begun:
        disk.leave(chance.randrange(2 * MIB))
        with pytest.raises(StorageError, match="cannot be written"):
            append_all(begun, data)
    assert store.received("run", 1, 0) == {}
    assert not disk.drafts()
    held, whole = store.held(ticket, announced[0])
    assert not whole
    with pytest.raises(StorageError, match="room for"):
        store.begin_upload(replace(ticket, client="bob"), *announced, 0, b"{}")
    disk.clear()
    with store.begin_upload(ticket, *announced, held, b"{}") as begun:
        begun.append(data[held:])
        begun.finish()
    [receipt] = store.received("run", 1, 0).values()
    assert store.payload("run", 1, 0, receipt) == data
    with pytest.raises(UploadRefused):
        store.begin_upload(ticket, *announced, 0, b"{}")


@pytest.mark.parametrize("seed", SEEDS)
def test_an_update_that_does_not_fit_is_not_kept(disk, seed):
    chance = random.Random(seed)
    outbox = Outbox(disk.path / "outbox")
    manifest, payload = encoded(honest(expectation()), {"x": torch.zeros(MIB // 4)})
    kept = outbox.keep("before", manifest, payload)
    disk.leave(chance.randrange(len(payload)))
    with pytest.raises(StorageError, match="No space left"):
        outbox.keep("after", manifest, payload)
    assert outbox.find("after") is None
    assert outbox.find("before") == kept
    assert not disk.drafts()
    disk.clear()
    assert outbox.keep("after", manifest, payload).payload.read_bytes() == payload


@pytest.fixture(scope="module")
def forty(tmp_path_factory):
    """The adapters of forty rounds."""
    run = Run(tmp_path_factory.mktemp("forty") / "run", rounds=40)
    run.go()
    run.store.close()
    return [event["adapter_sha256"] for event in run.rounds()]


@pytest.mark.parametrize("seed", SEEDS)
def test_events_that_do_not_fit_are_written_once_there_is_space(disk, tmp_path, forty, seed):
    """The journal stands on the full disk, the run elsewhere: no event is lost or doubled."""
    chance = random.Random(seed)
    run = Run(tmp_path / "run", rounds=40)
    log = MetricsLog(disk.path / "metrics.jsonl")

    class Events(list):
        def append(self, event):
            super().append(event)
            log.append(event)

    run.events = Events()
    disk.leave(4096 * chance.randrange(4))
    with pytest.raises(StorageError, match="No space left"):
        run.go()
    disk.clear()
    log.reconcile(run.store, run.store.load().round)
    run.go()
    assert [event["round"] for event in log.read()] == list(range(1, 41))
    assert [event["adapter_sha256"] for event in log.read()] == forty
    run.store.close()
