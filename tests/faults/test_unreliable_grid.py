"""Messages that are lost, doubled, late or old: the adapter of a run without trouble.

The round loop, the link over Flower, the exchange's store and the strategy are the real ones;
the test plays Flower and the workers, which keep what they made and send it again.
"""

import hashlib
import json
import random

import pytest
from flwr.common.constant import ErrorCode
from flwr.supercore.task_identity import TaskIdentity

from fedlora import __version__
from fedlora.errors import UploadRefused
from fedlora.flower_records import CONFIG
from fedlora.server.blob_store import BlobStore
from fedlora.server.flower_link import FlowerLink
from fedlora.server.link import Task
from fedlora.server.mail import Mail
from fedlora.server.nodes import Nodes
from fedlora.server.offers import Offers
from fedlora.tickets import check
from fedlora.wire import decode_broadcast, sha256
from tests.faults.history import Operation, problems, read_rounds
from tests.server.test_flower_link import KEY, PlayedGrid, answer, failure
from tests.server.toy import NAMES, Run

ROUNDS = 4
TROUBLES = {
    "lost": ErrorCode.MESSAGE_UNAVAILABLE,
    "reply lost": ErrorCode.REPLY_MESSAGE_UNAVAILABLE,
    "node away": ErrorCode.NODE_UNAVAILABLE,
    "app crashed": ErrorCode.CLIENT_APP_CRASHED,
}
FATES = [*TROUBLES, "well", "twice", "late", "late and silent"]


class Workers:
    """The clients' side: makes an update once per manifest, and sends what it has kept."""

    def __init__(self, toy, store):
        self.toy = toy
        self.store = store
        self.outbox = {}
        self.history = []
        self.recorded = []
        self.refused = []

    def work(self, message):
        fields = message.content.config_records[CONFIG]
        manifest, ticket = self.make(message), str(fields["upload_ticket"])
        self.recorded.append((ticket, *self.outbox[manifest]))
        self.send(*self.recorded[-1])

    def make(self, message):
        """Makes the update, unless it is made."""
        manifest = message.content.config_records[CONFIG]["manifest"]
        if manifest not in self.outbox:
            broadcast = decode_broadcast(manifest)
            parts = {
                digest: self.store.offered(broadcast.plan.run, digest).read_bytes()
                for digest in broadcast.parts.values()
            }
            reply = self.toy.answer(Task(broadcast.plan.client, manifest, 1 << 30), parts)
            self.outbox[manifest] = (reply.manifest, reply.payload)
            self._note("trained", reply.manifest)
        return manifest

    def send(self, ticket, manifest, payload):
        seat = check(KEY, ticket, 0.0)
        try:
            with self.store.begin_upload(seat, sha256(payload), len(payload), 0, manifest) as begun:
                begun.append(payload)
                begun.finish()
        except UploadRefused as e:
            self.refused.append(e.code)
        else:
            self._note("accepted", manifest)

    def _note(self, what, manifest):
        made = json.loads(manifest)
        key = (made["client"], made["round"], made["attempt"])
        self.history += [Operation(what, done, key, made["sha256"]) for done in (False, True)]


class UnreliableGrid(PlayedGrid):
    """Flower on a bad day; every message meets a fate drawn by `seed`."""

    def __init__(self, workers, seed):
        super().__init__(**dict.fromkeys(NAMES, 0))
        for said in self.says.values():
            said["version"] = __version__
        self.workers = workers
        self.chance = random.Random(seed)
        self.late = []
        self.met = []
        self.act = lambda grid, message: self.meet(message)

    def meet(self, message):
        fate = self.chance.choice(FATES)
        self.met.append(fate)
        if fate in TROUBLES:
            if fate == "reply lost":
                self.workers.work(message)
            if fate == "app crashed":
                self.late.append((message, False))
            return failure(message, TROUBLES[fate])
        if fate.startswith("late"):
            self.late.append((message, fate == "late"))
            return None
        for _ in range(2 if fate == "twice" else 1):
            self.workers.work(message)
        return answer(message, {})

    def pull_messages(self, ids):
        # what was late comes in any order, now or at a later look, and with it something old
        self.chance.shuffle(self.late)
        for _ in range(self.chance.randint(0, len(self.late))):
            message, replies = self.late.pop()
            self.workers.work(message)
            if replies:
                self.replies[message.metadata.message_id] = answer(message, {})
        if self.workers.recorded:
            before = len(self.workers.refused)
            self.workers.send(*self.chance.choice(self.workers.recorded))
            assert len(self.workers.refused) == before + 1, "an old upload was taken again"
        return super().pull_messages(ids)


@pytest.fixture(autouse=True)
def identity():
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1


def linked(run, grid, store):
    """Puts the link over Flower in the place of a toy run's own."""
    mail = Mail(grid)
    run.link = FlowerLink(
        "",
        "base",
        mail,
        Nodes(mail, run.spec.rank, run.events.append),
        Offers(store, KEY, "toy", ":8443"),
        enough=len(NAMES),
        patience_s=30.0,
        emit=run.events.append,
    )


def committed(run):
    """What the loop reported as committed, for the history."""
    for event in run.rounds():
        path = run.store.folder / f"rounds/{event['round']:04d}/round.json"
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        for done in (False, True):
            yield Operation("committed", done, (event["round"],), digest)


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    run = Run(tmp_path_factory.mktemp("clean") / "run", rounds=ROUNDS)
    run.go()
    yield [event["adapter_sha256"] for event in run.rounds()]
    run.store.close()


@pytest.mark.parametrize(
    "seed", [*range(3), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(3, 20))]
)
def test_messages_may_be_lost_doubled_late_and_old(tmp_path, clean, seed):
    run = Run(tmp_path / "run", rounds=ROUNDS)
    store = BlobStore(tmp_path / "exchange")
    workers = Workers(run.link, store)
    grid = UnreliableGrid(workers, seed)
    linked(run, grid, store)
    run.go()
    run.store.close()
    assert [event["adapter_sha256"] for event in run.rounds()] == clean
    history = [*workers.history, *committed(run)]
    assert problems(history, read_rounds(run.store.folder), ROUNDS) == []
    assert len(workers.outbox) == ROUNDS * len(NAMES)
    assert set(grid.met) & set(TROUBLES)
    assert set(workers.refused) <= {"busy", "taken", "closed"}


class SlowGrid(PlayedGrid):
    """One client does the work of round 2 when round 3 is asked for."""

    def __init__(self, workers, slow):
        super().__init__(**dict.fromkeys(NAMES, 0))
        self.workers = workers
        self.slow = slow
        self.behind = None
        self.act = lambda grid, message: self.meet(message)

    def meet(self, message):
        plan = decode_broadcast(message.content.config_records[CONFIG]["manifest"]).plan
        if (plan.client, plan.round) == (self.slow, 2):
            self.workers.make(message)
            self.behind = message
            return None
        if plan.round == 3 and self.behind is not None:
            self.workers.work(self.behind)
            self.behind = None
        self.workers.work(message)
        return answer(message, {})


def test_a_slow_client_is_left_behind_and_is_back_in_the_next_round(tmp_path):
    """The round is that of the others; what comes after the deadline is refused as too late."""
    run, others = (Run(tmp_path / name, rounds=3, deadline_s=1.0) for name in ("run", "others"))
    store = BlobStore(tmp_path / "exchange")
    workers = Workers(run.link, store)
    linked(run, SlowGrid(workers, "bob"), store)
    others.link.twist = lambda reply, plan: (
        [] if (plan.client, plan.round) == ("bob", 2) else [reply]
    )
    run.go()
    others.go()
    assert [e["missing"] for e in run.rounds()] == [[], ["bob"], []]
    assert workers.refused == ["closed"]
    assert [e["adapter_sha256"] for e in run.rounds()] == [
        e["adapter_sha256"] for e in others.rounds()
    ]
    for made in (run, others):
        made.store.close()
