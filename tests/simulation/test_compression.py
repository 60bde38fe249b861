"""Whole runs of a tiny model whose updates and broadcasts are coded."""

import math

import pytest
import torch

from fedlora.adapter import trained_shapes
from fedlora.client.state import ClientState
from fedlora.compress import round_trip
from fedlora.errors import ConfigError
from fedlora.messages import Coding
from fedlora.strategies import STRATEGIES
from fedlora.wire import decode_broadcast, decode_own
from tests.simulation.runs import Run

LOSSY = {"up": "int4", "top_k": 0.5, "down": "int8"}
METHOD_OF = {"fed-sb": "lora-xs"}
SGD = {"optimizer": "sgd", "learning_rate": 0.2, "max_grad_norm": 0.0}


@pytest.fixture
def make(make_job, tmp_path):
    def make_run(name="run", **sections):
        return Run(make_job(**sections), tmp_path / name)

    return make_run


def memory(run, client, number):
    """What a client has kept after round `number`."""
    return ClientState(run.folder / "clients" / client).before(number + 1)


def group(tensors, name):
    return {k.removeprefix(f"{name}."): v for k, v in tensors.items() if k.startswith(f"{name}.")}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_runs_coded_and_resumes_to_the_same_bits(make, strategy):
    sections = {
        "federation": {"strategy": strategy, "rounds": 2},
        "adapter": {"method": METHOD_OF.get(strategy, "lora")},
        "compression": LOSSY,
        "scenario": {"ranks": [2, 1, 1]} if strategy == "lora-a2" else {},
    }
    whole, pieces = make("whole", **sections), make("pieces", **sections)
    whole.go()
    for until in (1, 2):
        pieces.go(until)
    assert whole.adapters() == pieces.adapters()
    assert len(set(whole.adapters())) == 2
    assert whole.file(2) == pieces.file(2)
    assert not whole.of("rejected")
    owes = any(group(memory(whole, client, 2), "feedback") for client in whole.federation.clients)
    assert owes == (not STRATEGIES[strategy].regauges)
    for event in whole.of("round"):
        assert event["compression"] == {
            "up": {"scheme": "int4", "top_k": 0.5},
            "down": {"scheme": "int8", "top_k": 1.0},
            "feedback": True,
        }


def test_without_compression_no_event_speaks_of_it(make):
    run = make()
    run.go(until=1)
    assert "compression" not in run.of("round")[0]


def payload_bytes(shapes, scheme, top_k):
    """Data bytes of float32 tensors of these shapes, by the documented rules alone."""
    total = 0
    for shape in shapes.values():
        n = math.prod(shape)
        k = n if top_k == 1 else max(1, round(top_k * n))
        total += {"none": 4 * k, "bf16": 2 * k, "int8": k, "int4": math.ceil(k / 2)}[scheme]
        total += 2 * math.ceil(k / 64) if scheme in ("int8", "int4") else 0
        width = 1 if n <= 256 else 2
        total += 0 if top_k == 1 else min(math.ceil(n / 8), width * k)
    return total


def data_bytes(payload):
    return len(payload) - 8 - int.from_bytes(payload[:8], "little")


@pytest.mark.parametrize("top_k", [1.0, 0.05, 0.3])
@pytest.mark.parametrize("up", ["none", "bf16", "int8", "int4"])
def test_bytes_up_are_the_closed_form(make, up, top_k):
    run = make(compression={"up": up, "top_k": top_k}, federation={"rounds": 1})
    run.go()
    (event,), (replies,) = run.of("round"), run.tap.replies
    shapes = trained_shapes(run.federation.spec, run.federation.method)
    expected = payload_bytes(shapes, up, top_k)
    assert [data_bytes(reply.payload) for reply in replies] == [expected] * 3
    assert event["bytes_up"] == sum(len(r.payload) + len(r.manifest) for r in replies)


@pytest.mark.parametrize("down", ["none", "bf16", "int8"])
def test_bytes_down_are_the_closed_form(make, down):
    run = make(compression={"down": down}, federation={"rounds": 1})
    run.go()
    (event,), (tasks,) = run.of("round"), run.tap.tasks
    digests = decode_broadcast(tasks[0].manifest).parts
    shapes = trained_shapes(run.federation.spec, run.federation.method)
    heads = run.federation.spec.head_shapes
    for part, digest in digests.items():
        own = heads if part == "heads" else {k: v for k, v in shapes.items() if k[-2:] == part[-2:]}
        assert data_bytes(run.tap.parts[digest]) == payload_bytes(own, down, 1)
    sizes = sum(len(run.tap.parts[digest]) for digest in digests.values())
    assert event["bytes_down"] == sum(len(task.manifest) for task in tasks) + 3 * sizes


def watched(run, seen):
    """Work that notes what a client trained and what it hands to the link, before coding."""

    def work(federation):
        def inner(client, manifest, fetch):
            update = federation._work(client, manifest, fetch)
            trained = federation.loaded.adapted.state().tensors
            seen[update.round, client] = update.delta.tensors, trained
            return update

        return inner

    return work


@pytest.mark.parametrize("strategy", ["fedit", "rolora"])
@pytest.mark.parametrize("compression", [{"up": "int4"}, {"top_k": 0.2}])
def test_a_client_adds_what_it_owes_and_owes_what_did_not_travel(make, strategy, compression):
    """x = trained - start + e, and the next e is x - C(x), from the files of a whole run."""
    run = make(federation={"strategy": strategy}, compression=compression, run={"keep_rounds": 9})
    seen = {}
    run.go(work=watched(run, seen))
    coding = Coding(compression.get("up", "none"), compression.get("top_k", 1.0))
    for client in run.federation.clients:
        owed = {}
        for number in (1, 2, 3):
            start = decode_own(run.file(number - 1))
            change, trained = seen[number, client]
            received = round_trip(change, coding)
            for name, x in change.items():
                delta = trained[name] - start[name]
                assert torch.equal(x, delta + owed[name] if name in owed else delta)
                owed[name] = x - received[name]
            kept = group(memory(run, client, number), "feedback")
            assert kept.keys() == owed.keys()
            assert all(torch.equal(kept[name], tensor) for name, tensor in owed.items())
        assert any(bool(tensor.any()) for tensor in owed.values())


def test_without_feedback_nothing_is_kept(make):
    run = make(compression={"up": "int4", "error_feedback": False})
    run.go()
    assert not list((run.folder / "clients").rglob("*.state"))


def test_coded_runs_learn_nearly_as_well(make):
    """Of what training takes off the loss, so much is left; top-k lags behind."""

    def end(name, **compression):
        run = make(
            name,
            compression=compression,
            federation={"rounds": 8},
            training={"local_steps": 4},
            evaluation={"every": 8},
        )
        run.go()
        last = run.of("round")[-1]
        return run.of("start")[0]["eval"]["loss"] - last["eval"]["loss"], last["bytes_up"]

    gain, size = end("plain")
    assert gain > 0.1
    for part, compression in ((0.9, {"up": "int4", "down": "int8"}), (0.6, {"top_k": 0.1})):
        found, smaller = end("-".join(compression), **compression)
        assert found > part * gain
        assert smaller < 0.75 * size


def test_the_server_control_variate_stays_the_mean_of_the_clients(make):
    run = make(
        training=SGD,
        federation={"wrappers": [{"name": "scaffold"}]},
        compression={"up": "int4", "down": "int8"},
    )
    run.go()
    server = group(decode_own(run.file(3)), "control")
    own = [group(memory(run, client, 3), "control") for client in run.federation.clients]
    assert server
    for name, tensor in server.items():
        assert bool(tensor.any())
        mean = sum(control[name].double() for control in own) / len(own)
        torch.testing.assert_close(tensor.double(), mean, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("wrapper", "training"),
    [("scaffold", SGD), ("coordinate-median", {}), ("trimmed-mean", {})],
)
def test_what_needs_every_entry_is_refused_with_top_k(make, wrapper, training):
    sections = {"training": training, "federation": {"wrappers": [{"name": wrapper}]}}
    with pytest.raises(ConfigError, match=rf"wrapper '{wrapper}' .*\n?.*compression\.top_k = 0\.1"):
        make("sparse", compression={"top_k": 0.1}, **sections).go()
    make("dense", compression={"up": "int8"}, **sections).go(until=1)


def test_asynchronous_rounds_are_coded_and_resume(make):
    sections = {
        "partition": {"clients": 4},
        "federation": {"mode": "async", "buffer": 2, "rounds": 5},
        "scenario": {"stragglers": 0.5, "slowdown": 3.0},
        "compression": LOSSY,
    }
    whole, pieces = make("whole", **sections), make("pieces", **sections)
    whole.go()
    for until in (2, 5):
        pieces.go(until)
    assert whole.adapters() == pieces.adapters()
    assert whole.file(5) == pieces.file(5)
    assert not whole.of("rejected")


@pytest.mark.parametrize(("up", "top_k"), [("bf16", 0.3), ("int8", 1.0), ("int4", 0.3)])
def test_hostile_clients_are_refused_whatever_the_coding(make, up, top_k):
    kinds = ("nan", "huge-norm", "wrong-shape")
    run = make(
        partition={"clients": 4},
        federation={"quorum": 1, "rounds": 1},
        scenario={
            "hostile": [
                {"kind": kind, "clients": [f"client-00{i}"]} for i, kind in enumerate(kinds)
            ]
        },
        compression={"up": up, "top_k": top_k},
    )
    run.go()
    assert run.of("round")[0]["clients"] == ["client-003"]
    codes = [event["code"] for event in run.of("rejected")]
    assert codes == ["CODE" if up != "bf16" else "NOT_FINITE", "NORM", "SIZE"]


def test_a_client_starts_from_the_decoded_adapter(make):
    """With no steps its model holds, after its work, what it was given."""
    run = make(compression={"down": "int8"}, federation={"rounds": 1}, training={"local_steps": 0})
    held = []

    def work(federation):
        def inner(client, manifest, fetch):
            update = federation._work(client, manifest, fetch)
            held.append(federation.loaded.adapted.state().tensors)
            return update

        return inner

    run.go(work=work)
    begun = run.loaded.initial.tensors
    rounded = round_trip(begun, Coding("int8"))
    assert len(held) == 3
    for tensors in held:
        assert all(torch.equal(tensors[name], rounded[name]) for name in begun)
    assert any(not torch.equal(begun[name], rounded[name]) for name in begun)
    after = decode_own(run.file(1))
    assert all(torch.equal(after[name], begun[name]) for name in begun)
