"""A worker's work has the bytes of the simulation, whatever happens to the process."""

import os
import random
import signal
from contextlib import contextmanager

import pytest

from fedlora.client.duty import Duty
from fedlora.client.outbox import Outbox
from fedlora.client.policy import Policy, WorkPolicy
from fedlora.client.resident import Resident
from fedlora.data.own import OwnData
from fedlora.errors import TransferError, WorkRefused
from fedlora.wire import decode_broadcast, sha256
from tests.client.recorded import of, record
from tests.faults.crash import _arm

NAME = "client-001"
AT = "exchange:1"


class Blobs:
    """An exchange in memory."""

    def __init__(self, recorded):
        self.offered = {k: v for item in recorded for k, v in item.parts.items()}
        self.received = []
        self.broken = False

    @contextmanager
    def connect(self, address):
        assert address == AT
        yield self

    def fetch(self, ticket, digest, size_bytes=None, accept=int):
        if digest not in self.offered:
            raise TransferError("no such blob")
        return self.offered[digest]

    def send(self, ticket, manifest, payload, bytes_down):
        if self.broken:
            raise TransferError("the connection broke")
        self.received.append((manifest, payload.read_bytes()))
        return len(self.received[-1][1])


def duty(folder, blobs, *, place=1, policy=None):
    resident = Resident(OwnData(NAME, partition=place), "cpu")
    return Duty(NAME, folder, resident, blobs.connect, policy or Policy())


def silent(stage, done, planned):
    pass


# what clients keep for themselves, in turn: moments, control variates, factors; parts that
# stay the same from round to round; a trial that is thrown away
FEDERATIONS = {
    "moments": {"training": {"optimizer_state": "keep"}},
    "control": {
        "federation": {"wrappers": [{"name": "scaffold"}]},
        "training": {"optimizer": "sgd"},
    },
    "kept": {"federation": {"strategy": "fedsa-lora"}},
    "frozen": {"federation": {"strategy": "ffa-lora"}},
}


@pytest.fixture(scope="module")
def recordings(make_job, tmp_path_factory):
    return {
        name: of(record(make_job(**sections), tmp_path_factory.mktemp("run") / "run"), NAME)
        for name, sections in FEDERATIONS.items()
    }


def test_the_bytes_are_those_of_the_simulation_also_in_turns(recordings, tmp_path):
    """All jobs on one worker, round by round: each finds its own state, and loads in between."""
    everything = [item for items in recordings.values() for item in items]
    blobs = Blobs(everything)
    worker = duty(tmp_path, blobs)
    for item in sorted(everything, key=lambda item: item.round):
        answer = worker.do(item.order(exchange=AT, base_fingerprint=item.base), silent)
        assert (answer.manifest, answer.payload) == (item.update, None)
        assert blobs.received[-1] == (item.update, item.payload)
        assert answer.bytes_up == len(item.payload)
        # parts that it holds are not fetched again
        assert answer.bytes_down == item.bytes_down
        assert not answer.kept


def test_runs_in_turns_on_a_disk_for_one_give_the_same_bytes_and_leave_one(recordings, tmp_path):
    """What is cleared of a run that has not ended was not needed to go on with it."""
    everything = [item for items in recordings.values() for item in items]
    worker = duty(tmp_path, Blobs(everything))
    worker.runs.most = 1
    for item in sorted(everything, key=lambda item: item.round):
        answer = worker.do(item.order(exchange=AT), silent)
        assert answer.manifest == item.update
    last = max(recordings["frozen"], key=lambda item: item.round)
    assert os.listdir(tmp_path / "runs") == [decode_broadcast(last.manifest).plan.run]


def test_progress_counts_every_step(recordings, tmp_path):
    item = recordings["moments"][0]
    heard = []
    duty(tmp_path, Blobs([item])).do(item.order(exchange=AT), lambda *said: heard.append(said))
    assert heard == [
        ("loading", 0, 0),
        ("fetching", 0, 0),
        ("training", 0, 2),
        ("training", 1, 2),
        ("sending", 0, 0),
    ]


def test_an_update_that_was_not_sent_is_sent_without_training(recordings, tmp_path):
    item = recordings["moments"][0]
    blobs = Blobs([item])
    blobs.broken = True
    with pytest.raises(WorkRefused, match="the connection broke") as refused:
        duty(tmp_path, blobs).do(item.order(exchange=AT), silent)
    assert refused.value.code == "TRANSFER"
    blobs.broken = False
    # another process, that cannot fetch anything
    blobs.offered = {}
    again = duty(tmp_path, blobs)
    answer = again.do(item.order(exchange=AT), silent)
    assert answer.kept
    assert answer.seconds_to_first_step == 0
    assert blobs.received == [(item.update, item.payload)]
    # inline, the same update comes back in the call
    assert again.do(item.order(), silent).payload == item.payload


def test_what_is_acknowledged_is_forgotten_and_can_be_made_again(recordings, tmp_path):
    first, second, _ = recordings["moments"]
    worker = duty(tmp_path, Blobs([first, second]))
    worker.do(first.order(exchange=AT), silent)
    worker.do(second.order(exchange=AT, acknowledged=[sha256(first.manifest)]), silent)
    assert len(worker.outbox) == 1
    answer = worker.do(first.order(exchange=AT), silent)
    assert not answer.kept
    assert answer.manifest == first.update


def test_refusals_say_what_kind_they_are(recordings, tmp_path):
    item = recordings["moments"][0]
    blobs = Blobs([item])
    small = Policy(work=WorkPolicy(max_rank=1))

    def refusal(worker, item=item, **fields):
        with pytest.raises(WorkRefused) as refused:
            worker.do(item.order(**{"exchange": AT, **fields}), silent)
        return refused.value.code, str(refused.value)

    code, why = refusal(duty(tmp_path, blobs), base_fingerprint="f" * 64)
    assert code == "BASE"
    assert "f" * 12 in why
    assert item.base[:12] in why
    assert refusal(duty(tmp_path, blobs, policy=small))[0] == "POLICY"
    assert refusal(duty(tmp_path, blobs, place=7))[0] == "DATA"
    assert refusal(duty(tmp_path, Blobs([])))[0] == "TRANSFER"
    assert refusal(duty(tmp_path, blobs), exchange="")[0] == "TRANSFER"
    other = duty(tmp_path, blobs)
    other.name = "client-002"
    assert refusal(other)[0] == "SPEC"
    assert not list(Outbox(tmp_path / "outbox").folder.glob("*"))


@pytest.mark.parametrize("trials", [3, pytest.param(30, marks=pytest.mark.slow)])
def test_a_worker_killed_at_any_write_gives_the_same_bytes(recordings, tmp_path, trials):
    """kill -9 before, amid or after any write, sync or rename, over and over again."""
    items = recordings["moments"]
    blobs = Blobs(items)
    # loaded once, for every process that is forked below
    warm = duty(tmp_path, blobs)
    warm.resident.hold(warm.resident.as_here(items[0].order().job))
    kills = 0
    for seed in range(trials):
        chance = random.Random(seed)
        folder = tmp_path / str(seed)
        while True:
            point, moment = chance.randint(1, 36), chance.choice(["before", "half", "after"])
            child = os.fork()
            if child == 0:
                code = 1
                try:
                    worker = Duty(NAME, folder, warm.resident, blobs.connect, Policy())
                    _arm(point, moment)
                    for item in items:
                        worker.do(item.order(exchange=AT), silent)
                        assert blobs.received[-1] == (item.update, item.payload)
                    code = 0
                finally:
                    os._exit(code)
            _, status = os.waitpid(child, 0)
            if not os.WIFSIGNALED(status):
                assert os.waitstatus_to_exitcode(status) == 0
                break
            assert os.WTERMSIG(status) == signal.SIGKILL
            kills += 1
    assert kills >= 2 * trials
