"""The apps under plain Flower: no server of ours, no exchange, workers that nodes start."""

import os
import signal
from pathlib import Path

import pytest
from flwr.app import Context, RecordDict
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

from fedlora.client.flower import app as client_app
from fedlora.client.own_worker import own_worker
from fedlora.client.worker_call import WorkerCall
from fedlora.server.flower import app as server_app
from tests.deployed.federation import call, digests, write_job

FIRST_NODE = 100


class DirectGrid(Grid):
    """Flower in one process: a message is answered by the ClientApp itself, at once."""

    def __init__(self, clients):
        self.nodes = [FIRST_NODE + place for place in range(clients)]
        self.replies = {}

    def set_run(self, run):
        raise AssertionError("not used")

    @property
    def run(self):
        raise AssertionError("not used")

    def create_message(self, *args, **kwargs):
        raise AssertionError("not used")

    def get_node_ids(self):
        return self.nodes

    def get_nodes(self):
        return [NodeInfo(node_id=node) for node in self.nodes]

    def push_messages(self, messages):
        ids = []
        for message in messages:
            node = message.metadata.dst_node_id
            message.metadata.__dict__["_message_id"] = message.object_id
            TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, node, 1
            config = {"partition-id": node - FIRST_NODE}
            context = Context(1, node, config, RecordDict(), {})
            reply = client_app(message=message, context=context)
            ids.append(message.object_id)
            self.replies[message.object_id] = reply
        TaskIdentity.node_id = 1
        return ids

    def pull_messages(self, message_ids):
        return [self.replies.pop(name) for name in message_ids if name in self.replies]

    def send_and_receive(self, messages, *, timeout=None):
        raise AssertionError("not used")


@pytest.fixture
def workers(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDLORA_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("FEDLORA_SERVER_HOME", raising=False)
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
    yield
    for place in range(2):
        worker = own_worker(FIRST_NODE + place, f"client-{place:03d}", place)
        with WorkerCall(worker.socket, 5.0) as worker_call:
            os.kill(worker_call.status(5.0).pid, signal.SIGTERM)


def test_plain_flower_gives_the_adapter_of_a_simulation(make_job, tmp_path, workers):
    job = make_job(partition={"clients": 2}, federation={"rounds": 2})
    path = write_job(tmp_path / "job.toml", job)
    call("simulate", path, "--out", tmp_path / "simulated")
    config = {"job": str(path), "out": str(tmp_path / "plain")}
    server_app(grid=DirectGrid(2), context=Context(1, 1, {}, RecordDict(), config))
    assert digests(tmp_path / "plain") == digests(tmp_path / "simulated")
    assert Path(tmp_path / "plain" / "report.html").is_file()
