"""The run folder: a round is there whole or not at all, and damage is never loaded."""

import contextlib
import errno
import os
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fedlora.storage
from fedlora.checkpoint import RunStore
from fedlora.errors import RunFolderError, StorageError
from fedlora.storage import write_atomic

JOB = 'name = "job"\n'


def tensors_of(number):
    draws = torch.Generator().manual_seed(number)
    return {"q.A": torch.randn(2, 3, generator=draws), "q.B": torch.randn(3, 2, generator=draws)}


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def record_of(number):
    return {"run": "lineage", "extra": {"n": number}, "events": [{"event": "round"}]}


def new_run(folder, rounds=0):
    files = {"spec.json": b"{}"}
    store = RunStore.create(folder, JOB, "digest", tensors_of(0), record_of(0), files)
    for number in range(1, rounds + 1):
        store.commit(number, tensors_of(number), record_of(number))
    return store


def reopened(folder):
    store = RunStore.open(folder, "digest")
    try:
        return store.load(), store.fallback
    finally:
        store.close()


def flip(path, place, bit):
    data = bytearray(path.read_bytes())
    data[place] ^= 1 << bit
    path.write_bytes(bytes(data))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A closed folder with rounds 0 to 3."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    new_run(folder, rounds=3).close()
    return folder


def test_what_was_committed_comes_back(tmp_path):
    store = new_run(tmp_path / "run")
    for number in range(4):
        if number:
            store.commit(number, tensors_of(number), record_of(number))
        committed = store.load()
        assert committed.round == number
        assert same(committed.tensors, tensors_of(number))
        assert {**committed.record, **record_of(number)} == committed.record
        assert store.fallback is None
    store.close()
    committed, fallback = reopened(tmp_path / "run")
    assert (committed.round, fallback) == (3, None)
    assert same(committed.tensors, tensors_of(3))
    assert (tmp_path / "run" / "job.toml").read_text() == JOB
    assert (tmp_path / "run" / "spec.json").read_bytes() == b"{}"


def test_an_empty_folder_may_be_used(tmp_path):
    (tmp_path / "run").mkdir()
    new_run(tmp_path / "run").close()
    assert reopened(tmp_path / "run")[0].round == 0


@pytest.mark.parametrize("kind", ["folder", "file", "run"])
def test_nothing_is_overwritten(tmp_path, kind):
    place = tmp_path / "run"
    if kind == "folder":
        place.mkdir()
        (place / "mine").write_text("x")
    elif kind == "file":
        place.write_text("x")
    else:
        new_run(place).close()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(RunFolderError, match="exists and is not empty"):
        new_run(place)
    assert sorted(tmp_path.rglob("*")) == before


def test_other_folders_are_not_opened(tmp_path):
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(RunFolderError, match="is not a run folder"):
            RunStore.open(folder, "digest")


def test_a_folder_in_use_is_refused_until_it_is_closed(tmp_path):
    store = new_run(tmp_path / "run")
    with pytest.raises(RunFolderError, match="in use by another process"):
        RunStore.open(tmp_path / "run", "digest")
    store.close()
    RunStore.open(tmp_path / "run", "digest").close()


def test_another_job_is_refused(finished):
    store = RunStore.open(finished, "other")
    with pytest.raises(RunFolderError, match="is not the job that this run was started with"):
        store.load()
    store.close()


NEWEST = ["HEAD", "rounds/0003/round.json", "rounds/0003/global.safetensors"]


@pytest.mark.parametrize("name", NEWEST)
@settings(max_examples=70)
@given(data=st.data())
def test_one_flipped_bit_is_always_detected(finished, tmp_path_factory, name, data):
    """70 bits in each of three files; the fault matrix of the design asks for 200 in all."""
    folder = tmp_path_factory.mktemp("flip") / "run"
    shutil.copytree(finished, folder)
    before = (folder / name).read_bytes()
    place = data.draw(st.integers(0, len(before) - 1))
    flip(folder / name, place, data.draw(st.integers(0, 7)))
    try:
        committed, fallback = reopened(folder)
    finally:
        shutil.rmtree(folder)
    # without its head the newest intact round is found; without a file of it, the one before
    assert committed.round == (3 if name == "HEAD" else 2)
    assert same(committed.tensors, tensors_of(committed.round))
    whitespace = before[place : place + 1].isspace()
    assert fallback or (name == "HEAD" and whitespace)


def test_every_digest_of_a_record_may_be_damaged_without_losing_another_round(finished, tmp_path):
    """Each of the hex digits of `previous` in turn: only round 3 is lost."""
    text = (finished / NEWEST[1]).read_bytes()
    start = text.index(b'"previous":"') + len(b'"previous":"')
    for place in range(start, start + 64, 9):
        folder = tmp_path / str(place)
        shutil.copytree(finished, folder)
        flip(folder / NEWEST[1], place, 0)
        assert reopened(folder)[0].round == 2


@pytest.mark.parametrize("name", [*NEWEST, "rounds/0003"])
def test_a_missing_file_falls_back_too(finished, tmp_path, name):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    if name == "HEAD":
        (folder / name).unlink()
        with pytest.raises(RunFolderError, match="is not a run folder"):
            RunStore.open(folder, "digest")
        return
    (shutil.rmtree if name == "rounds/0003" else os.unlink)(folder / name)
    committed, fallback = reopened(folder)
    assert committed.round == 2
    assert "round 3" in fallback
    assert "continuing from round 2" in fallback


@pytest.mark.parametrize("name", NEWEST)
def test_files_cut_short_at_any_length_fall_back(finished, tmp_path, name):
    data = (finished / name).read_bytes()
    for size in {0, 1, 7, len(data) // 2, len(data) - 1}:
        folder = tmp_path / str(size)
        shutil.copytree(finished, folder)
        (folder / name).write_bytes(data[:size])
        committed, fallback = reopened(folder)
        assert same(committed.tensors, tensors_of(committed.round))
        assert fallback or data[size:].isspace()


def test_damage_to_all_rounds_is_an_error_that_names_them(finished, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    for number in range(4):
        flip(folder / "rounds" / f"{number:04d}" / "global.safetensors", -1, 0)
    with pytest.raises(RunFolderError, match=r"round 3.*round 2.*round 1.*round 0"):
        reopened(folder)


def test_a_swapped_round_is_detected(finished, tmp_path):
    """A whole, intact, older round in the place of the newest."""
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    shutil.rmtree(folder / "rounds/0003")
    shutil.copytree(folder / "rounds/0001", folder / "rounds/0003")
    committed, fallback = reopened(folder)
    assert committed.round == 2
    assert fallback


def test_a_round_done_again_after_a_fallback_is_chained_to_what_it_started_from(finished, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    flip(folder / NEWEST[1], 5, 1)
    store = RunStore.open(folder, "digest")
    assert store.load().round == 2
    store.commit(3, tensors_of(30), record_of(3))
    assert same(store.load().tensors, tensors_of(30))
    flip(folder / NEWEST[2], -1, 0)
    committed = store.load()
    store.close()
    assert committed.round == 2
    assert same(committed.tensors, tensors_of(2))


def test_files_of_an_uncommitted_round_are_not_seen(finished, tmp_path):
    """A crash between the round's files and HEAD."""
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    head = (folder / "HEAD").read_bytes()
    store = RunStore.open(folder, "digest")
    store.load()
    store.commit(4, tensors_of(4), record_of(4))
    (folder / "HEAD").write_bytes(head)
    assert store.load().round == 3
    store.commit(4, tensors_of(40), record_of(4))
    assert same(store.load().tensors, tensors_of(40))
    store.close()


def test_pruning_keeps_the_last_and_every_tenth(tmp_path):
    store = new_run(tmp_path / "run")
    for number in range(1, 26):
        store.commit(number, tensors_of(number), record_of(number))
        store.prune(number, keep=3, every=10)
    kept = sorted(p.parent.name for p in (tmp_path / "run").glob("rounds/*/global.safetensors"))
    assert kept == ["0000", "0010", "0020", "0023", "0024", "0025"]
    assert all(store.record(number) is not None for number in range(26))
    flip(tmp_path / "run/rounds/0025/global.safetensors", -1, 0)
    assert store.load().round == 24
    for number in (24, 23):
        flip(tmp_path / f"run/rounds/{number:04d}/global.safetensors", -1, 0)
    # round 22 and 21 are pruned, so the next one is the last tenth
    assert store.load().round == 20
    assert "continuing from round 20" in store.fallback
    store.close()


def test_a_damaged_record_is_not_given_out(finished, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    store = RunStore.open(folder, "digest")
    text = (folder / NEWEST[1]).read_bytes()
    assert store.record(3)["extra"] == {"n": 3}
    (folder / NEWEST[1]).write_bytes(text.replace(b'"n":3', b'"n":4'))
    assert store.record(3) is None
    assert store.record(9) is None
    store.close()


class Recorder:
    """The os module, but for a log of what is done to files."""

    def __init__(self):
        self.log = []
        self.paths = {}

    def __getattr__(self, name):
        return getattr(os, name)

    def open(self, path, *rest):
        descriptor = os.open(path, *rest)
        self.paths[descriptor] = Path(path).name
        return descriptor

    def write(self, descriptor, data):
        self.log.append(("write", self.paths[descriptor]))
        return os.write(descriptor, data)

    def fsync(self, descriptor):
        self.log.append(("fsync", self.paths[descriptor]))
        os.fsync(descriptor)

    def rename(self, old, new):
        self.log.append(("rename", Path(new).name))
        os.rename(old, new)


def test_a_commit_syncs_in_the_order_that_survives_a_crash(tmp_path, monkeypatch):
    """fsync of a file before its rename before fsync of the folder, HEAD last.

    Pillai et al., "All File Systems Are Not Created Equal", OSDI 2014, section 2.
    """
    store = new_run(tmp_path / "run")
    recorder = Recorder()
    monkeypatch.setattr(fedlora.storage, "os", recorder)
    store.commit(1, tensors_of(1), record_of(1))
    monkeypatch.undo()
    store.close()

    def written(name, folder):
        return [
            ("write", f"{name}.tmp"),
            ("fsync", f"{name}.tmp"),
            ("rename", name),
            ("fsync", folder),
        ]

    assert recorder.log == [
        ("fsync", "rounds"),
        *written("global.safetensors", "0001"),
        *written("round.json", "0001"),
        *written("HEAD", "run"),
    ]


class FullDisk(Recorder):
    """The os module of a disk that is full from the n-th write on."""

    def __init__(self, writes):
        super().__init__()
        self.writes = writes

    def write(self, descriptor, data):
        if self.writes == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.writes -= 1
        # short writes, as POSIX allows them
        return os.write(descriptor, bytes(data[:100]))


def files_in(folder):
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_full_disk_leaves_the_former_head(finished, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    store = RunStore.open(folder, "digest")
    store.load()
    monkeypatch.setattr(fedlora.storage, "os", FullDisk(0))
    with pytest.raises(StorageError, match="No space left on device") as caught:
        store.commit(4, tensors_of(4), record_of(4))
    assert caught.value.exit_code == 3
    for writes in range(50):
        monkeypatch.setattr(fedlora.storage, "os", FullDisk(writes))
        with contextlib.suppress(StorageError):
            store.commit(4, tensors_of(4), record_of(4))
            break
        monkeypatch.undo()
        assert not list(folder.rglob("*.tmp"))
        committed = store.load()
        assert (committed.round, store.fallback) == (3, None)
        assert same(committed.tensors, tensors_of(3))
    monkeypatch.undo()
    assert writes > 5
    assert same(store.load().tensors, tensors_of(4))
    store.close()


def test_a_full_disk_at_the_start_leaves_nothing(tmp_path, monkeypatch):
    for writes in range(50):
        monkeypatch.setattr(fedlora.storage, "os", FullDisk(writes))
        try:
            new_run(tmp_path / "run").close()
            break
        except StorageError:
            assert not list(tmp_path.iterdir())
        finally:
            monkeypatch.undo()
    assert writes > 5
    assert same(reopened(tmp_path / "run")[0].tensors, tensors_of(0))


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomic(path, b"old")
    data = bytes(range(256)) * 2
    for writes in range(10):
        monkeypatch.setattr(fedlora.storage, "os", FullDisk(writes))
        try:
            write_atomic(path, data)
            break
        except StorageError:
            assert files_in(tmp_path) == {path: b"old"}
        finally:
            monkeypatch.undo()
    assert writes == 6
    assert files_in(tmp_path) == {path: data}
