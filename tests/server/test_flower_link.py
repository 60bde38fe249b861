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
from fedlora.flower_records import CONFIG, QUERY, text
from fedlora.messages import Broadcast, RoundPlan
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


class Garbled(PlayedGrid):
    """A grid that cannot unpack what one node sent."""

    garbled = 10

    def pull_messages(self, ids):
        found = super().pull_messages(ids)
        if any(reply.metadata.src_node_id == self.garbled for reply in found):
            raise ValueError("not to be unpacked")
        return found


def test_a_reply_that_cannot_be_unpacked_is_its_sender_s_error_alone(store):
    grid = Garbled(ann=0, bob=0)
    grid.garbled = 0
    link = link_of(grid, store)
    link.gather(2)

    def act(grid, message):
        if message.metadata.dst_node_id == 11:
            upload(store, message)
        return answer(message, {"error": "", "kept": False})

    grid.act, grid.garbled = act, 10
    replies = exchanged(link, "ann", "bob")
    assert replies["ann"].error == "its reply cannot be read (ValueError)"
    assert replies["bob"].payload == b"the update"


def test_a_node_keeps_the_name_of_its_key_also_while_it_is_off_line(store):
    grid = PlayedGrid(bob=0)
    grid.nodes[10] = "ann"
    events = []
    link = link_of(grid, store, events)
    nodes = link.nodes
    # greeted, and gone before its answer is taken in
    posted = grid.push_messages
    grid.push_messages = lambda messages: [posted(messages), grid.nodes.clear()][0]
    nodes.look()
    nodes.look()
    assert nodes.seats == {}
    assert [e["why"] for e in events if e["event"] == "refused"] == [
        "it calls itself 'bob', but its key belongs to 'ann'"
    ]


def test_a_name_that_no_certificate_can_carry_is_refused(store):
    grid = PlayedGrid(ann=0)
    grid.says[10]["name"] = "x" * 65
    link = link_of(grid, store)
    link.nodes.look()
    assert not link.nodes.seats
    assert "expected 1 to 64" in link.nodes.refusals()[10]


def test_a_later_client_of_another_rank_is_refused_where_ranks_must_be_equal(store):
    grid = PlayedGrid(ann=0, bob=4)
    mail = Mail(grid)
    nodes = Nodes(mail, 8, lambda event: None, equal_ranks=True)
    nodes.look()
    assert [client.name for client in nodes.present()] == ["ann"]
    assert "trains rank 4 at most; the strategy needs rank 8" in nodes.refusals()[11]


def test_what_a_peer_says_is_cut_and_cannot_steer_a_terminal():
    found = text({"error": "\x1b]0;owned\x07" + "x" * 10**6}, "error")
    assert found.startswith("\\x1b]0;owned\\x07xxx")
    assert len(found) < 700
