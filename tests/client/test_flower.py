"""The ClientApp as Flower calls it, with a worker in a process of its own."""

import itertools
import os
import signal
import subprocess
import sys

import grpc
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from fedlora import __version__
from fedlora.client.flower import app
from fedlora.client.worker_process import main
from fedlora.protos.worker_pb2 import PartChunk, WorkMessage
from fedlora.protos.worker_pb2_grpc import WorkerStub
from tests.client.recorded import of, record

NAME = "client-001"
IDS = itertools.count()


@pytest.fixture(autouse=True)
def identity():
    before = TaskIdentity._task_id, TaskIdentity._run_id, TaskIdentity._node_id
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    yield
    TaskIdentity._task_id, TaskIdentity._run_id, TaskIdentity._node_id = before


@pytest.fixture(scope="module")
def rounds(make_job, tmp_path_factory):
    return of(record(make_job(), tmp_path_factory.mktemp("run") / "run"), NAME)


def start(folder):
    command = [sys.executable, "-m", "fedlora.client.worker_process", "--name", NAME]
    command += ["--socket", folder / "w.sock", "--state", folder / "state", "--partition", "1"]
    return subprocess.Popen([*map(str, command)], stdout=subprocess.DEVNULL)


def ended(process, number):
    process.send_signal(number)
    return process.wait(60)


def message(kind, fields=None, parts=None, ttl=120.0):
    content = RecordDict({"fedlora": ConfigRecord(fields or {})})
    if parts:
        arrays = {k: Array("uint8", (len(v),), "safetensors", v) for k, v in parts.items()}
        content["parts"] = ArrayRecord(arrays)
    made = Message(content, 7, kind, ttl=ttl)
    made.metadata.__dict__["_message_id"] = f"message-{next(IDS)}"
    return made


def ask(item, config, **fields):
    sent = {"job": item.job, "manifest": item.manifest, "exchange": "", "base": item.base}
    context = Context(1, 7, config, RecordDict(), {})
    reply = app(message("train", {**sent, **fields}, item.parts), context)
    arrays = reply.content.array_records.get("payload")
    payload = b"".join(array.data for array in arrays.values()) if arrays else b""
    return reply.content.config_records["fedlora"], payload


def query(config, ttl=120.0):
    reply = app(message("query", ttl=ttl), Context(1, 7, config, RecordDict(), {}))
    return reply.content.config_records["fedlora"]


def begin(path, item):
    """Calls the worker itself, and comes back when training has begun."""
    messages = [WorkMessage(header=item.header())]
    for digest, data in item.parts.items():
        messages += [WorkMessage(part=PartChunk(sha256=digest, chunk=data))]
    channel = grpc.insecure_channel(f"unix:{path}")
    for event in WorkerStub(channel).Work(iter(messages)):
        if event.progress.stage == "training":
            break
    return channel


def test_a_run_in_flower_messages_with_a_worker_that_is_killed(rounds, tmp_path):
    """kill -9 amid training; the shim waits for the next worker, and the bytes are the same."""
    config = {"name": NAME, "worker-socket": str(tmp_path / "w.sock"), "rank": 2}
    first = start(tmp_path)
    identity = {"name": NAME, "version": __version__, "rank": 2, "pid": first.pid}
    assert dict(query(config)) == identity
    found, payload = ask(rounds[0], config)
    assert (found["manifest"], payload) == (rounds[0].update, rounds[0].payload)
    assert found["kept"] == 0
    assert found["seconds_to_first_step"] > 0
    with begin(tmp_path / "w.sock", rounds[1]):
        assert ended(first, signal.SIGKILL) == -signal.SIGKILL
    second = start(tmp_path)
    try:
        for item in rounds[1:]:
            found, payload = ask(item, config)
            assert (found["manifest"], payload) == (item.update, item.payload)
        found, payload = ask(rounds[2], config)
        assert (found["kept"], payload) == (1, rounds[2].payload)
        # what a worker refuses is a reply like any other
        other = rounds[0].manifest.replace(b"client-001", b"client-002")
        found, payload = ask(rounds[0], config, manifest=other)
        assert (found["code"], payload) == ("SPEC", b"")
        assert "client-002" in found["error"]
        found, _ = ask(rounds[0], config, manifest=b"{}")
        assert found["code"] == "WORKER"
        assert "INVALID_ARGUMENT" in found["error"]
    finally:
        assert ended(second, signal.SIGTERM) == 0
    assert not (tmp_path / "w.sock").exists()


def test_without_a_worker_the_reply_says_so(tmp_path):
    config = {"name": NAME, "worker-socket": str(tmp_path / "none.sock"), "rank": 0}
    # the message's own time bounds the wait
    found = query(config, ttl=6.0)
    assert "no worker answers" in found["error"]
    assert found["name"] == NAME
    assert "worker-socket" in query({})["error"]


def test_a_node_without_a_worker_starts_one_and_finds_it_again(rounds, tmp_path, monkeypatch):
    monkeypatch.delenv("FEDLORA_WORKER_SOCKET", raising=False)
    monkeypatch.setenv("FEDLORA_HOME", str(tmp_path))
    config = {"partition-id": 1, "num-partitions": 3}
    first = query(config)
    assert first["name"] == NAME, dict(first)
    try:
        found, payload = ask(rounds[0], config)
        assert (found["manifest"], payload) == (rounds[0].update, rounds[0].payload)
        assert query(config)["pid"] == first["pid"]
    finally:
        os.kill(first["pid"], signal.SIGTERM)


def test_the_client_app_imports_nothing_slow():
    code = (
        "import sys, fedlora.client.flower; print([m for m in ('torch', 'transformers', "
        "'pydantic', 'datasets', 'safetensors', 'scipy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["--name", "a/b"], "--name 'a/b' is no file name"),
        (["--name", "a", "--data", "x.csv", "--partition", "1"], "leave one out"),
        (["--name", "a", "--ca", "ca.crt"], "give all three"),
        (["--name", "a", "--policy", "none.toml"], "none.toml does not exist"),
    ],
)
def test_bad_options_end_with_2_and_say_why(tmp_path, capsys, options, why):
    place = ["--socket", str(tmp_path / "w.sock"), "--state", str(tmp_path / "state")]
    assert main([*options, *place]) == 2
    assert why in capsys.readouterr().err
