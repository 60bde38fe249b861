"""The link over Flower and the exchange, with a Grid whose nodes the test plays."""

import tracemalloc
from dataclasses import replace

import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.app.error import Error
from flwr.common.constant import ErrorCode
from flwr.proto.node_pb2 import NodeInfo
from flwr.supercore.task_identity import TaskIdentity

from fedlora import __version__
from fedlora.flower_records import CONFIG, QUERY
from fedlora.messages import Broadcast, RoundPlan
from fedlora.server import posted
from fedlora.server.blob_store import BlobStore
from fedlora.server.flower_link import FlowerLink
from fedlora.server.link import Task
from fedlora.server.mail import Mail
from fedlora.server.nodes import Nodes
from fedlora.server.offers import Offers
from fedlora.tickets import check
from fedlora.wire import encode_broadcast, sha256

RUN = "0123456789abcdef"
KEY = bytes(32)
PART = b"a part of the broadcast"


class PlayedGrid:
    """Nodes that answer as the test says.

    Attributes:
        nodes: id -> name under which the node's key was registered.
        says: id -> what it answers to a greeting.
        act: (grid, message) -> what happens when work is posted; gives a reply or None.
    """

    def __init__(self, **names):
        self.nodes = {10 + place: "" for place in range(len(names))}
        self.says = {
            10 + place: {"name": name, "version": __version__, "rank": rank}
            for place, (name, rank) in enumerate(names.items())
        }
        self.act = lambda grid, message: None
        self.posted = []
        self.replies = {}

    def get_nodes(self):
        return [NodeInfo(node_id=node, name=name) for node, name in self.nodes.items()]

    def push_messages(self, messages):
        ids = []
        for message in messages:
            name = message.object_id
            message.metadata.__dict__["_message_id"] = name
            ids.append(name)
            if message.metadata.message_type == QUERY:
                self.replies[name] = answer(message, self.says[message.metadata.dst_node_id])
                continue
            self.posted.append(message)
            reply = self.act(self, message)
            if reply is not None:
                self.replies[name] = reply
        return ids

    def pull_messages(self, ids):
        return [self.replies.pop(name) for name in ids if name in self.replies]


def answer(message, fields):
    TaskIdentity.node_id = message.metadata.dst_node_id
    record = ConfigRecord(fields)
    reply = Message(RecordDict({CONFIG: record}), reply_to=message)
    TaskIdentity.node_id = 1
    return reply


def failure(message, code):
    TaskIdentity.node_id = message.metadata.dst_node_id
    reply = Message(Error(code, "said by Flower"), reply_to=message)
    TaskIdentity.node_id = 1
    return reply


@pytest.fixture(autouse=True)
def identity():
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1


@pytest.fixture
def store(tmp_path):
    return BlobStore(tmp_path / "exchange")


def link_of(grid, store, events=None):
    emit = (lambda event: None) if events is None else events.append
    mail = Mail(grid)
    return FlowerLink(
        "",
        "base",
        mail,
        Nodes(mail, 8, emit),
        Offers(store, KEY, RUN, ":8443"),
        enough=1,
        patience_s=0.0,
        emit=emit,
    )


def task(client, attempt=0):
    plan = RoundPlan(RUN, 1, attempt, client, ("A", "B"), 4, 1)
    manifest = encode_broadcast(Broadcast(plan, "spec", {"factor.A": sha256(PART)}))
    return Task(client, manifest, 1000)


def upload(store, message, payload=b"the update"):
    """What a worker does with a message: sends an update by its ticket."""
    fields = message.content.config_records[CONFIG]
    ticket = check(KEY, str(fields["upload_ticket"]), 0.0)
    with store.begin_upload(
        ticket, sha256(payload), len(payload), 0, b"manifest of " + ticket.client.encode(), 77
    ) as begun:
        begun.append(payload)
        begun.finish()


def exchanged(link, *names, deadline_s=5.0):
    found = link.exchange([task(name) for name in names], {sha256(PART): PART}, deadline_s)
    return {reply.client: reply for reply in found}


def test_clients_join_by_name_with_the_rank_they_can_train(store):
    link = link_of(PlayedGrid(zoe=0, ann=2, bob=99), store)
    assert [(c.name, c.rank) for c in link.gather(3)] == [("ann", 2), ("bob", 8), ("zoe", 8)]


@pytest.mark.parametrize(
    ("change", "registered", "why"),
    [
        ({"version": "0.0.9"}, "", f"runs fedlora 0.0.9, the server {__version__}"),
        ({"name": ""}, "", "it gave no name"),
        ({"name": "bob"}, "ann", "calls itself 'bob', but its key belongs to 'ann'"),
    ],
)
def test_a_node_that_may_not_join_is_named(store, change, registered, why):
    grid, events = PlayedGrid(ann=0), []
    grid.says[10] |= change
    grid.nodes[10] = registered
    link = link_of(grid, store, events)
    assert link.gather(1) == []
    assert why in next(e["why"] for e in events if e["event"] == "refused")
    assert why in link.nodes.refusals()[10]


def test_an_update_counts_once_the_exchange_has_it(store):
    grid = PlayedGrid(ann=0, bob=0)
    grid.act = lambda grid, message: upload(store, message)
    link = link_of(grid, store)
    link.gather(2)
    replies = exchanged(link, "ann", "bob")
    assert replies["ann"].manifest == b"manifest of ann"
    assert replies["bob"].payload == b"the update"
    assert replies["bob"].bytes_down == 77 + len(task("bob").manifest)


def test_tickets_are_for_this_client_this_round_and_these_bytes(store):
    grid = PlayedGrid(ann=0)
    grid.act = lambda grid, message: upload(store, message)
    link = link_of(grid, store)
    link.gather(1)
    exchanged(link, "ann")
    fields = grid.posted[0].content.config_records[CONFIG]
    up, down = (check(KEY, str(fields[f"{way}_ticket"]), 0.0) for way in ("upload", "download"))
    assert (up.client, up.round, up.attempt, up.node) == ("ann", 1, 0, 10)
    assert (up.direction, up.max_bytes) == ("up", 1000)
    assert (down.direction, down.max_bytes) == ("down", len(PART))


def test_what_came_in_before_a_crash_is_not_asked_for_again(store):
    grid = PlayedGrid(ann=0)
    grid.act = lambda grid, message: upload(store, message)
    first = link_of(grid, store)
    first.gather(1)
    assert exchanged(first, "ann")
    second = link_of(grid, store)
    second.gather(1)
    grid.act = lambda grid, message: pytest.fail("posted again")
    assert exchanged(second, "ann")["ann"].payload == b"the update"


def test_what_a_client_refuses_is_said(store):
    grid = PlayedGrid(ann=0)
    grid.act = lambda grid, message: answer(message, {"error": "no such column", "code": "DATA"})
    link = link_of(grid, store)
    link.gather(1)
    reply = exchanged(link, "ann")["ann"]
    assert (reply.error, reply.payload) == ("DATA: no such column", b"")


@pytest.mark.parametrize(
    "code",
    [ErrorCode.NODE_UNAVAILABLE, ErrorCode.CLIENT_APP_CRASHED, ErrorCode.MESSAGE_UNAVAILABLE],
)
def test_a_node_that_was_away_is_asked_again(store, code):
    grid, answers = PlayedGrid(ann=0), [code]

    def act(grid, message):
        if answers:
            return failure(message, answers.pop())
        return upload(store, message)

    grid.act = act
    link = link_of(grid, store)
    link.gather(1)
    assert exchanged(link, "ann")["ann"].payload == b"the update"
    assert len(grid.posted) == 2


@pytest.fixture
def impatient(monkeypatch):
    """What was not heard of is posted again at once."""
    monkeypatch.setattr(posted, "UNHEARD_S", 0.0)


def test_work_that_a_killed_clientapp_never_took_is_posted_again(store, impatient):
    """Flower neither hands its message out again nor answers with an error."""
    grid, lost = PlayedGrid(ann=0), [True]

    def act(grid, message):
        if lost:
            lost.pop()
            return None
        return upload(store, message)

    grid.act = act
    link = link_of(grid, store)
    link.gather(1)
    assert exchanged(link, "ann")["ann"].payload == b"the update"
    assert len(grid.posted) == 2


def test_work_that_was_posted_twice_may_be_answered_twice(store, impatient):
    grid = PlayedGrid(ann=0, bob=0)
    first = []

    def act(grid, message):
        first.append(message)
        if len(first) < 3:
            return None
        if len(first) == 3:
            # the first message was only slow: both come in at one look
            grid.replies[first[0].metadata.message_id] = answer(first[0], {"error": "too small"})
        return answer(message, {"error": "too small"})

    grid.act = act
    link = link_of(grid, store)
    link.gather(2)
    found = exchanged(link, "ann", "bob", deadline_s=1.0)
    assert {reply.error for reply in found.values()} == {"too small"}
    assert set(found) == {"ann", "bob"}


def test_a_greeting_that_a_killed_clientapp_never_took_is_sent_again(store, impatient):
    grid, lost = PlayedGrid(ann=0), [True]
    push = grid.push_messages

    def push_messages(messages):
        ids = push(messages)
        if lost:
            lost.pop()
            grid.replies.clear()
        return ids

    grid.push_messages = push_messages
    link = link_of(grid, store)
    link.patience_s = 5.0
    assert [client.name for client in link.gather(1)] == ["ann"]


def test_a_client_that_comes_back_as_another_node_is_asked_there(store):
    grid = PlayedGrid(ann=0)

    def act(grid, message):
        if message.metadata.dst_node_id == 20:
            return upload(store, message)
        # killed: its successor registers under the same name
        grid.says[20] = grid.says.pop(10)
        grid.nodes = {20: ""}
        return failure(message, ErrorCode.NODE_UNAVAILABLE)

    grid.act = act
    link = link_of(grid, store)
    link.gather(1)
    assert exchanged(link, "ann")["ann"].payload == b"the update"
    assert [m.metadata.dst_node_id for m in grid.posted] == [10, 20]


def test_a_silent_client_is_waited_for_no_longer_than_the_deadline(store):
    grid = PlayedGrid(ann=0, bob=0)

    def act(grid, message):
        if message.metadata.dst_node_id == 10:
            upload(store, message)

    grid.act = act
    link = link_of(grid, store)
    link.gather(2)
    assert set(exchanged(link, "ann", "bob", deadline_s=0.6)) == {"ann"}


def test_an_update_is_acknowledged_with_the_next_work(store):
    grid = PlayedGrid(ann=0)
    grid.act = lambda grid, message: upload(store, message)
    link = link_of(grid, store)
    link.gather(1)
    exchanged(link, "ann")
    later = replace(task("ann", attempt=1))
    list(link.exchange([later], {sha256(PART): PART}, 5.0))
    fields = grid.posted[1].content.config_records[CONFIG]
    assert list(fields["acknowledged"]) == [sha256(task("ann").manifest)]


class Unreadable:
    """A reply that a Grid drops, with all it has pulled, and cannot make into a message."""


class StrictGrid(PlayedGrid):
    def pull_messages(self, ids):
        found = super().pull_messages(ids)
        if any(isinstance(reply, Unreadable) for reply in found):
            raise UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte")
        return found


def test_a_reply_that_cannot_be_read_is_its_clients_fault_alone(store):
    grid = StrictGrid(ann=0, bob=0, cyd=0)

    def act(grid, message):
        node = message.metadata.dst_node_id
        return Unreadable() if node == 11 else answer(message, {"error": f"node {node}"})

    grid.act = act
    link = link_of(grid, store)
    link.gather(3)
    replies = exchanged(link, "ann", "bob", "cyd")
    assert (replies["ann"].error, replies["cyd"].error) == ("node 10", "node 12")
    assert "its reply cannot be read (UnicodeDecodeError" in replies["bob"].error


def test_a_greeting_whose_answer_cannot_be_read_keeps_nobody_else_out(store):
    grid, events = StrictGrid(ann=0, bob=0), []
    link = link_of(grid, store, events)
    real = grid.push_messages

    def push(messages):
        ids = real(messages)
        for name, message in zip(ids, messages, strict=True):
            if message.metadata.dst_node_id == 10:
                grid.replies[name] = Unreadable()
        return ids

    grid.push_messages = push
    assert [client.name for client in link.gather(1)] == ["bob"]
    assert "cannot be read" in link.nodes.refusals()[10]


def test_of_many_replies_each_is_looked_for():
    grid = PlayedGrid(**{f"c{k:03d}": 0 for k in range(150)})
    nodes = Nodes(Mail(grid), 8, lambda event: None)
    for _ in range(3):
        nodes.look()
    assert len(nodes.present()) == 150


def test_without_an_exchange_a_reply_without_our_record_is_an_empty_one(store):
    grid = PlayedGrid(ann=0)

    def act(grid, message):
        reply = answer(message, {})
        del reply.content[CONFIG]
        return reply

    grid.act = act
    link = link_of(grid, store)
    link.offers = None
    link.gather(1)
    reply = exchanged(link, "ann")["ann"]
    assert (reply.manifest, reply.payload) == (b"", b"")


def test_a_node_that_answers_when_it_is_off_line_gets_no_other_clients_seat(store):
    """Its heartbeat lapses after it was greeted; its key was registered for ann."""
    grid, events = PlayedGrid(ann=0), []
    grid.nodes[10] = "ann"
    held, real = {}, grid.pull_messages
    grid.pull_messages = lambda ids: []
    link = link_of(grid, store, events)
    grid.says[10]["name"] = "bob"
    link.nodes.look()
    held, grid.nodes = dict(grid.nodes), {}
    grid.pull_messages = real
    link.nodes.look()
    grid.nodes = held
    link.nodes.look()
    assert link.nodes.seats == {}
    assert "its key belongs to 'ann'" in link.nodes.refusals()[10]


@pytest.mark.parametrize("name", ["x" * 81, "two\nlines", "\x1b[2J"])
def test_a_name_that_cannot_be_a_clients_is_refused_and_not_passed_on(store, name):
    grid, events = PlayedGrid(ann=0), []
    grid.says[10]["name"] = name
    link = link_of(grid, store, events)
    assert link.gather(1) == []
    [refused] = [event for event in events if event["event"] == "refused"]
    assert "expected at most 80 printable characters" in refused["why"]
    assert refused["why"].isprintable()


def test_the_longest_name_fits_a_ticket(store):
    name = "\U0001f984" * 80
    grid = PlayedGrid(**{name: 0})
    grid.act = lambda grid, message: upload(store, message)
    link = link_of(grid, store)
    link.gather(1)
    assert exchanged(link, name)[name].payload == b"the update"


@pytest.mark.parametrize("what", ["error", "version", "name"])
def test_what_a_node_says_is_cut_and_made_printable(store, what):
    grid, events = PlayedGrid(ann=0), []
    grid.says[10][what] = "\x1b[31m" + "x" * 2_000_000
    link_of(grid, store, events).gather(1)
    [why] = [e["why"] for e in events if e["event"] in ("refused", "not-ready")]
    assert len(why) < 1000
    assert why.isprintable()


def test_a_node_of_an_unfit_rank_is_refused_whenever_it_comes(store):
    grid, events = PlayedGrid(ann=8), []
    link = link_of(grid, store, events)
    link.nodes.misfit = lambda rank: "" if rank == 8 else f"no rank {rank}"
    assert len(link.gather(1)) == 1
    grid.nodes[20] = ""
    grid.says[20] = {"name": "bob", "version": __version__, "rank": 2}
    assert [client.name for client in link.roster()] == ["ann"]
    assert link.nodes.refusals()[20] == "client 'bob': no rank 2"


def test_a_client_that_is_restarted_between_two_rounds_is_waited_for(store):
    grid = PlayedGrid(ann=0, bob=0)
    link = link_of(grid, store)
    link.patience_s = 60.0
    link.gather(2)
    assert len(link.roster()) == 2
    away, looks, real = grid.nodes.pop(11), [], grid.get_nodes

    def get_nodes():
        looks.append(1)
        if len(looks) == 3:
            grid.nodes[21], grid.says[21] = away, grid.says[11]
        return real()

    grid.get_nodes = get_nodes
    assert [client.name for client in link.roster()] == ["ann", "bob"]
    assert link.nodes.seats["bob"].node == 21


def test_a_client_that_has_left_is_waited_for_once(store, monkeypatch):
    monkeypatch.setattr("fedlora.server.flower_link.RETURN_S", 0.3)
    grid = PlayedGrid(ann=0, bob=0)
    link = link_of(grid, store)
    link.patience_s = 60.0
    link.gather(2)
    link.roster()
    del grid.nodes[11]
    looks, real = [], grid.get_nodes
    grid.get_nodes = lambda: looks.append(1) or real()
    assert len(link.roster()) == 1
    assert len(looks) > 1
    looks.clear()
    assert len(link.roster()) == 1
    assert len(looks) == 1


@pytest.mark.parametrize("clients", [8, 64])
def test_one_update_at_a_time_is_in_memory(store, clients):
    size = 1 << 20
    names = [f"c{k:02d}" for k in range(clients)]
    grid = PlayedGrid(**dict.fromkeys(names, 0))
    grid.act = lambda grid, message: upload(store, message, bytes(size))
    link = link_of(grid, store)
    link.gather(clients)
    tasks = [replace(task(name), max_bytes=size) for name in names]
    replies = link.exchange(tasks, {sha256(PART): PART}, 60.0)
    assert len(next(replies).payload) == size
    tracemalloc.start()
    try:
        assert sum(len(reply.payload) for reply in replies) == (clients - 1) * size
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # the one that is handed out, and the one that is read next
    assert peak < 3 * size
