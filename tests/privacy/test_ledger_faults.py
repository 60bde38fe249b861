"""Whatever happens to the ledger's process or files: noticed, or nothing is under-reported."""

import errno
import os
import random
import shutil
from pathlib import Path

import pytest

import fedlora.privacy.ledger_file
import fedlora.storage
from fedlora.errors import BudgetExhausted, LedgerError, StorageError
from fedlora.privacy.ledger_entry import STATUSES
from fedlora.privacy.ledger_file import LedgerFile, fold, read_lines
from tests.privacy.ledger_crash import PLAN, lives, read_log
from tests.privacy.ledger_laws import KEY, STEP, cost, open_ledger, release, times

HISTORIES = [*range(6), *(pytest.param(n, marks=pytest.mark.slow) for n in range(6, 100))]
ROUNDS = 8


def charged(folder):
    """What the files say, without completing them."""
    found = read_lines(folder)
    return [] if found is None else fold(folder, found[0]).charged()


def filled(folder, entries):
    """A ledger with reservations in every status, of two runs; returns its files' folder."""
    with open_ledger(folder, epsilon=None) as ledger:
        number = 0
        while ledger.head[0] < entries:
            number += 1
            wanted = release(number, run=f"run-{number % 2}")
            ledger.reserve(wanted, [STEP])
            if number % 4 == 3:
                ledger.void(wanted)
            elif number % 4:
                ledger.spend(wanted, [STEP], b"x")
                if number % 4 == 1:
                    ledger.released(wanted)
    return folder / KEY


@pytest.mark.parametrize("seed", HISTORIES)
def test_killed_at_any_point_it_never_says_less_than_was_done(tmp_path, seed):
    """Against the harness's own count of steps; no budget is overrun, no round sent twice over."""
    chance = random.Random(seed)
    folder, log = tmp_path / "privacy", tmp_path / "log"
    budget = chance.choice((cost(*PLAN * 5), cost(*PLAN * 20)))
    kills = 0
    while (ending := lives(folder, log, ROUNDS, budget, chance)) == "killed":
        kills += 1
        told = read_log(log)
        with open_ledger(folder, epsilon=budget) as ledger:
            assert cost(*told.events()) <= ledger.epsilon() <= cost(*PLAN * told.asked)
            assert ledger.epsilon() <= budget
    assert ending in ("finished", "exhausted")
    told = read_log(log)
    assert cost(*told.events()) <= budget
    assert all(len(bytes_sent) == 1 for bytes_sent in told.sent.values())
    assert ending == "exhausted" or told.done == list(range(1, ROUNDS + 1))


def test_unharmed_it_says_exactly_what_was_done(tmp_path):
    folder, log = tmp_path / "privacy", tmp_path / "log"
    assert lives(folder, log, ROUNDS, 50.0, None) == "finished"
    with open_ledger(folder) as ledger:
        assert ledger.epsilon() == cost(*read_log(log).events()) == cost(*PLAN * ROUNDS)


def test_no_release_after_the_budget_ever(tmp_path):
    folder, log = tmp_path / "privacy", tmp_path / "log"
    budget = cost(*PLAN * 5)
    for _ in range(3):
        assert lives(folder, log, ROUNDS, budget, None) == "exhausted"
        told = read_log(log)
        assert told.done == [1, 2, 3, 4, 5]
        assert cost(*told.events()) <= budget


@pytest.mark.parametrize("entries", [12, pytest.param(50, marks=pytest.mark.slow)])
def test_cut_off_at_any_byte_it_is_completed_or_refused(tmp_path, entries):
    """Within the last line, the head file has the rest: the entry counts."""
    folder = filled(tmp_path / "privacy", entries)
    truth, path = charged(folder), folder / "ledger"
    data = path.read_bytes()
    last = data.rindex(b"\n", 0, -1) + 1
    for size in range(len(data) - 1, -1, -1):
        os.truncate(path, size)
        if size >= last:
            assert charged(folder) == truth
        else:
            with pytest.raises(LedgerError, match="its head file knows line"):
                charged(folder)


@pytest.mark.parametrize("status", STATUSES)
@pytest.mark.parametrize("zeros", [0, 700])
def test_a_torn_last_line_is_completed_on_disk(tmp_path, status, zeros):
    """A file system may have grown the file without its bytes."""
    statuses = {"RESERVED": 0, "SPENT": 1, "RELEASED": 2}
    with open_ledger(tmp_path) as ledger:
        ledger.reserve(release(), [STEP])
        if status == "VOID":
            ledger.void(release())
        if statuses.get(status, 0) >= 1:
            ledger.spend(release(), [STEP], b"x")
        if statuses.get(status, 0) >= 2:
            ledger.released(release())
        whole = ledger.epsilon()
    path = tmp_path / KEY / "ledger"
    data = path.read_bytes()
    last = data.rindex(b"\n", 0, -1) + 1
    for size in (last, last + 1, len(data) - 1):
        path.write_bytes(data[:size] + b"\0" * zeros)
        with open_ledger(tmp_path) as ledger:
            assert ledger.epsilon() == whole
        assert path.read_bytes() == data


def flip_bits(folder, bits_of):
    """Flips bits of the ledger and of its head, one at a time; each must be noticed."""
    for name in ("ledger", "head"):
        path = folder / name
        data = path.read_bytes()
        with path.open("r+b", buffering=0) as file:
            for place, byte in enumerate(data):
                for bit in bits_of(place):
                    os.pwrite(file.fileno(), bytes([byte ^ 1 << bit]), place)
                    with pytest.raises(LedgerError, match="--new-budget"):
                        charged(folder)
                os.pwrite(file.fileno(), bytes([byte]), place)


def test_a_flipped_bit_in_any_byte_is_noticed(tmp_path):
    folder = filled(tmp_path / "privacy", 8)
    chance = random.Random(0)
    flip_bits(folder, lambda place: [chance.randrange(8)])
    assert charged(folder)


@pytest.mark.slow
def test_any_flipped_bit_is_noticed(tmp_path):
    folder = filled(tmp_path / "privacy", 50)
    flip_bits(folder, lambda place: range(8))
    assert charged(folder)


def test_lines_dropped_swapped_repeated_or_forged_are_noticed(tmp_path):
    folder = filled(tmp_path / "privacy", 12)
    path = folder / "ledger"
    lines = path.read_bytes().splitlines(keepends=True)
    changed = [lines[:5] + lines[6:], [*lines[:5], lines[6], lines[5], *lines[7:]]]
    changed += [[*lines[:6], lines[5], *lines[6:]], [*lines, lines[-1]], lines[1:]]
    for each in changed:
        path.write_bytes(b"".join(each))
        with pytest.raises(LedgerError):
            charged(folder)


@pytest.mark.parametrize("name", ["ledger", "head"])
def test_a_missing_file_is_refused(tmp_path, name):
    folder = filled(tmp_path / "privacy", 3)
    (folder / name).unlink()
    for _ in range(2):
        with pytest.raises(LedgerError, match="--new-budget"):
            open_ledger(tmp_path / "privacy")


def test_an_older_head_is_refused(tmp_path):
    with open_ledger(tmp_path) as ledger:
        ledger.reserve(release(1), [STEP])
        head = (tmp_path / KEY / "head").read_bytes()
        ledger.reserve(release(2), [STEP])
    (tmp_path / KEY / "head").write_bytes(head)
    with pytest.raises(LedgerError, match="goes beyond line 1"):
        open_ledger(tmp_path)


def test_deleted_while_open_it_is_refused(tmp_path):
    with open_ledger(tmp_path / "privacy") as ledger:
        ledger.reserve(release(), [STEP])
        shutil.rmtree(tmp_path / "privacy" / KEY)
        with pytest.raises(LedgerError, match="missing"):
            ledger.reserve(release(2), [STEP])


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


def recorded(monkeypatch, recorder, work):
    with monkeypatch.context() as patch:
        patch.setattr(fedlora.storage, "os", recorder)
        patch.setattr(fedlora.privacy.ledger_file, "os", recorder)
        work()


def test_everything_is_synced_before_the_next_thing_may_happen(tmp_path, monkeypatch):
    """fsync of a file before its rename before fsync of the folder; the bytes before SPENT.

    Pillai et al., "All File Systems Are Not Created Equal", OSDI 2014, section 2.
    """
    recorder = Recorder()

    def atomic(name, folder):
        draft = f"{name}.tmp"
        return [("write", draft), ("fsync", draft), ("rename", name), ("fsync", folder)]

    entry = [*atomic("head", KEY), ("write", "ledger"), ("fsync", "ledger")]
    with open_ledger(tmp_path) as ledger:
        recorded(monkeypatch, recorder, lambda: ledger.reserve(release(), [STEP]))
        assert recorder.log == entry
        recorder.log.clear()
        recorded(monkeypatch, recorder, lambda: ledger.spend(release(), [STEP], b"x"))
        assert recorder.log == [*atomic("00000001", "releases"), *entry]


class FullDisk(Recorder):
    """The os module of a disk that is full from the n-th write on; that one is cut short."""

    def __init__(self, writes):
        super().__init__()
        self.left = writes

    def write(self, descriptor, data):
        self.left -= 1
        if self.left > 0:
            return os.write(descriptor, data)
        if self.left == 0:
            return os.write(descriptor, bytes(data)[: len(data) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_on_a_full_disk_the_ledger_is_never_behind_the_training(tmp_path, monkeypatch):
    """Every write of three rounds; what failed may be charged, what was done must be."""
    # the header's two, and five a round
    for writes in range(1, 18):
        folder = tmp_path / str(writes)
        done = []

        def work(folder=folder, done=done):
            with open_ledger(folder) as ledger:
                for number in (1, 2, 3):
                    ledger.reserve(release(number), [STEP])
                    done.append(STEP)
                    ledger.spend(release(number), [STEP], b"x" * 100)

        with pytest.raises(StorageError, match="No space left"):
            recorded(monkeypatch, FullDisk(writes), work)
        with open_ledger(folder) as ledger:
            assert cost(*done) <= ledger.epsilon() <= cost(times(len(done) + 1))
            ledger.reserve(release(9), [STEP])
            assert ledger.epsilon() >= cost(times(len(done) + 1))
        assert not list(folder.rglob("*.tmp"))


def test_processes_at_once_spend_one_budget_between_them(tmp_path):
    """Four processes reserve until they are refused: the budget of 12 is used up, once."""
    children = []
    for name in "abcd":
        child = os.fork()
        if child == 0:
            count = 0
            try:
                with open_ledger(tmp_path, epsilon=cost(times(12))) as ledger:
                    while True:
                        ledger.reserve(release(count + 1, start=name * 64), [STEP])
                        count += 1
            except BudgetExhausted:
                os._exit(count)
            finally:
                os._exit(99)
        children.append(child)
    counts = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert sum(counts) == 12
    with open_ledger(tmp_path) as ledger:
        assert ledger.epsilon() == cost(times(12))


def test_a_lock_that_stays_is_an_error_that_says_so(tmp_path):
    with open_ledger(tmp_path):
        pass
    holder = LedgerFile(tmp_path / KEY, 0.0)
    with holder.locked(), pytest.raises(LedgerError, match="held by another process"):
        open_ledger(tmp_path, wait_s=0.0)
    holder.close()
    with open_ledger(tmp_path, wait_s=0.0) as ledger:
        assert ledger.epsilon() == 0.0


def test_old_bytes_go_and_their_charge_stays(tmp_path):
    with open_ledger(tmp_path) as ledger:
        for number in range(1, 8):
            ledger.reserve(release(number), [STEP])
            ledger.spend(release(number), [STEP], b"%d" % number)
        kept = [number for number in range(1, 8) if ledger.cached(release(number))]
        assert kept == [5, 6, 7]
        assert ledger.epsilon() == cost(times(7))
