"""Whole runs of a tiny model: resumes, equal bits, bytes, and the log."""

import json

import pytest
import torch

from fedlora.adapter import trained_shapes
from fedlora.adapters import METHODS
from fedlora.errors import RunFolderError, StorageError
from fedlora.models.loaded import load
from fedlora.server.admission import expected_size
from fedlora.simulation.federation import Federation
from fedlora.wire import decode_broadcast
from tests.simulation.runs import Run, loaded_for

STRATEGIES = ("fedit", "ffa-lora", "rolora")
TROUBLED = {
    "dropout": 0.3,
    "stragglers": 0.25,
    "slowdown": 9.0,
    "hostile": [
        {"kind": "replay", "clients": ["client-000"]},
        {"kind": "shift", "clients": ["client-001"], "strength": 0.5},
        {"kind": "label-flip", "clients": ["client-002"]},
    ],
}


@pytest.fixture
def make(make_job, tmp_path):
    def make_run(name="run", loaded=None, clients=None, **sections):
        return Run(make_job(**sections), tmp_path / name, loaded, clients)

    return make_run


@pytest.mark.parametrize("optimizer_state", ["reset", "keep"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_run_in_pieces_equals_a_run_in_one_bit_for_bit(make, strategy, optimizer_state):
    sections = {
        "federation": {"strategy": strategy},
        "training": {"optimizer_state": optimizer_state, "momentum": 0.5},
        "adapter": {"dropout": 0.1},
    }
    whole, pieces = make("whole", **sections), make("pieces", **sections)
    whole.go()
    for until in (1, 3):
        pieces.go(until)
    assert whole.adapters() == pieces.adapters()
    assert len(set(whole.adapters())) == 3
    assert whole.file(3) == pieces.file(3)
    assert [e["round"] for e in pieces.of("resume")] == [1]


@pytest.mark.parametrize("strategy", ["fedit", "rolora"])
def test_a_troubled_run_may_be_resumed_after_every_round(make, strategy):
    """Absent, slow, hostile and unequal clients are drawn by name, not by what came before."""
    scenario = TROUBLED if strategy == "fedit" else {**TROUBLED, "ranks": [2, 1]}
    sections = {
        "scenario": scenario,
        "partition": {"clients": 4},
        "federation": {
            "strategy": strategy,
            "quorum": 1,
            "rounds": 4,
            "deadline_s": 10.0,
            "clients_per_round": 3,
        },
    }
    whole, pieces = make("whole", **sections), make("pieces", **sections)
    whole.go()
    for until in range(1, 5):
        pieces.go(until)
    assert whole.adapters() == pieces.adapters()
    assert whole.file(4) == pieces.file(4)
    for event, again in zip(whole.of("round"), pieces.of("round"), strict=True):
        assert [event[k] for k in ("clients", "missing", "rejected")] == [
            again[k] for k in ("clients", "missing", "rejected")
        ]


def test_the_same_job_gives_the_same_bits(make, make_job):
    """Two models and two readings of the data; another seed gives others."""
    first, second = make("a"), make("b", loaded=load(make_job()))
    assert first.loaded.base.model is not second.loaded.base.model
    first.go()
    second.go()
    assert first.adapters() == second.adapters()
    assert first.file(3) == second.file(3)
    other = make("c", run={"seed": 1})
    other.go()
    assert not set(other.adapters()) & set(first.adapters())


def test_a_run_leaves_the_base_and_the_global_generator_alone(make):
    run = make()
    base = run.loaded.base.model
    trained = {id(p) for p in run.loaded.adapted.parameters().values()}
    frozen = {n: p.detach().clone() for n, p in base.named_parameters() if id(p) not in trained}
    before = torch.get_rng_state()
    run.go()
    assert torch.equal(torch.get_rng_state(), before)
    names = dict(base.named_parameters())
    assert all(torch.equal(names[n], value) for n, value in frozen.items())


def test_the_order_and_set_of_clients_is_that_of_their_names(make):
    whole = make("a")
    whole.go()
    turned = dict(reversed(whole.loaded.data.clients.items()))
    again = make("b", clients=turned)
    again.go()
    assert whole.adapters() == again.adapters()


def test_a_folder_of_another_base_or_adapter_is_refused(make, make_job):
    run = make()
    run.go(until=1)
    other = Run(run.job, run.folder, loaded_for(make_job(adapter={"rank": 1})))
    with pytest.raises(RunFolderError, match="another base model or adapter"):
        other.go()


def sizes(run, parts):
    """Bytes of the canonical files of these parts at full rank."""
    spec, method = run.federation.spec, run.federation.method
    whole = trained_shapes(spec, method)
    return sum(
        expected_size(
            {k: v for k, v in whole.items() if (k in spec.head_shapes) == (part == "heads")
             and (part == "heads" or k.endswith(f".{part}"))}
        )
        for part in parts
    )  # fmt: skip


@pytest.mark.parametrize(
    ("strategy", "down", "up"),
    [
        # what a client does not hold already: everything that changed since it last fetched
        ("fedit", [("A", "B", "heads")] * 4, [("A", "B")] * 4),
        ("ffa-lora", [("A", "B", "heads"), *[("B", "heads")] * 3], [("B",)] * 4),
        (
            "rolora",
            [("A", "B", "heads"), ("B", "heads"), ("A", "heads"), ("B", "heads")],
            [("B",), ("A",)] * 2,
        ),
    ],
)
def test_bytes_are_those_of_the_changed_parts(make, strategy, down, up):
    run = make(federation={"strategy": strategy, "rounds": 4})
    run.go()
    spec, method = run.federation.spec, run.federation.method
    for number, event in enumerate(run.of("round")):
        tasks, replies = run.tap.tasks[number], run.tap.replies[number]
        manifests = sum(len(task.manifest) for task in tasks)
        assert event["bytes_down"] == manifests + 3 * sizes(run, down[number])
        payload = expected_size(trained_shapes(spec, method, up[number]))
        assert all(len(reply.payload) == payload for reply in replies)
        assert event["bytes_up"] == 3 * payload + sum(len(r.manifest) for r in replies)


def test_a_client_that_was_away_fetches_what_it_missed(make):
    """RoLoRA with one client in turn: after an absence both factors are stale."""
    run = make(federation={"strategy": "rolora", "clients_per_round": 1, "rounds": 6})
    run.go()
    held = {}
    for tasks, replies, event in zip(run.tap.tasks, run.tap.replies, run.of("round"), strict=True):
        (task,), (reply,) = tasks, replies
        parts = decode_broadcast(task.manifest).parts
        fresh = [p for p, digest in parts.items() if held.get(task.client, {}).get(p) != digest]
        held[task.client] = parts
        expected = sizes(run, [p.removeprefix("factor.") for p in fresh])
        assert reply.bytes_down == event["bytes_down"] == len(task.manifest) + expected


def test_a_client_that_diverges_is_rejected_and_the_round_goes_on(make, make_job):
    """The same client with a learning rate of 3e38; the others' round, bit for bit."""
    wild = make_job(training={"learning_rate": 3e38, "optimizer": "sgd", "max_grad_norm": 0.0})
    sections = {"federation": {"quorum": 2}, "training": {"local_steps": 4}}
    run, clean = make("run", **sections), make("clean", **sections)

    def work(federation):
        other = Federation(wild, run.loaded)
        return lambda client, *rest: (other if client == "client-001" else federation)._work(
            client, *rest
        )

    run.go(work=work)
    honest = {k: v for k, v in run.loaded.data.clients.items() if k != "client-001"}
    clean.clients = honest
    clean.go()
    assert run.adapters() == clean.adapters()
    rejected = run.of("rejected")
    assert [(e["client"], e["code"]) for e in rejected] == [("client-001", "CLIENT_ERROR")] * 3
    assert "the loss is" in rejected[0]["detail"]


def test_moments_are_kept_by_the_client_only_if_asked(make):
    for state, kept in (("reset", False), ("keep", True)):
        run = make(state, training={"optimizer_state": state})
        run.go()
        found = sorted(p.name for p in (run.folder / "clients").rglob("*.state"))
        assert found == kept * sorted(f"000{n}.state" for n in (1, 2, 3) for _ in range(3))


def test_moments_that_were_damaged_are_refused_until_they_are_removed(make):
    run = make(training={"optimizer_state": "keep"})
    run.go(until=2)
    (kept,) = (run.folder / "clients" / "client-001").glob("0002.*")
    data = bytearray(kept.read_bytes())
    data[-1] ^= 1
    kept.write_bytes(data)
    run.go()
    (rejected,) = run.of("rejected")
    assert (rejected["client"], rejected["code"]) == ("client-001", "CLIENT_ERROR")
    assert str(kept) in rejected["detail"]
    assert run.of("round")[-1]["clients"] == ["client-000", "client-002"]
    kept.unlink()
    (run.folder / "rounds" / "0003" / "global.safetensors").unlink()
    run.go()
    assert len(run.of("rejected")) == 1


@pytest.mark.parametrize("error", [RuntimeError("out of memory\nmore"), KeyError("x"), OSError()])
def test_a_client_that_fails_in_any_way_is_a_client_that_failed(make, error):
    """torch reports memory that ran out as a RuntimeError."""

    def failing(federation):
        def work(client, manifest, fetch):
            if client == "client-001":
                raise error
            return federation._work(client, manifest, fetch)

        return work

    run = make(federation={"rounds": 1})
    run.go(work=failing)
    (rejected,) = run.of("rejected")
    assert (rejected["client"], rejected["code"]) == ("client-001", "CLIENT_ERROR")
    first = (str(error).splitlines() or [""])[0]
    assert rejected["detail"] == f"{type(error).__name__}: {first}"
    assert run.of("round")[0]["clients"] == ["client-000", "client-002"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), StorageError("full")])
def test_ctrl_c_and_a_full_disk_are_no_failure_of_a_client(make, error):
    def failing(federation):
        def work(client, manifest, fetch):
            raise error

        return work

    run = make(federation={"rounds": 1})
    with pytest.raises(type(error)):
        run.go(work=failing)


def finished(make, name="run"):
    run = make(name, federation={"strategy": "ffa-lora"})
    run.go()
    return run


DAMAGE = {
    "gone": lambda text: None,
    "empty": lambda text: b"",
    "tail lost": lambda text: b"".join(text.splitlines(True)[:-2]),
    "last line torn": lambda text: text[:-40],
    "last line is not UTF-8": lambda text: text[:-9] + b"\xff\xfe" + text[-7:],
    "last line is a number": lambda text: b"".join(text.splitlines(True)[:-1]) + b"17\n",
    "newline lost": lambda text: text[:-1],
    "middle lost": lambda text: b"".join(text.splitlines(True)[::2]),
    "uncommitted rounds": lambda text: text + b'{"event": "round", "round": 9}\n',
    "an uncommitted half line": lambda text: text + b'{"event": "abandoned", "rou',
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_the_log_is_brought_back_to_what_was_committed(make, kind):
    run = finished(make)
    path = run.folder / "metrics.jsonl"
    whole, before = path.read_bytes(), run.lines()
    damaged = DAMAGE[kind](whole)
    path.unlink() if damaged is None else path.write_bytes(damaged)
    run.go()
    after = path.read_bytes().splitlines()
    assert [json.loads(line)["event"] for line in after] == ["start", *["round"] * 3, "resume"]
    assert run.lines()[:-1] == before


def test_an_event_after_a_torn_line_is_not_lost(make):
    """The first line of a new process must not continue a half line of the old one."""
    run = make(federation={"rounds": 2})
    run.go(until=1)
    path = run.folder / "metrics.jsonl"
    path.write_bytes(path.read_bytes() + b'{"event": "abandoned", "rou')
    run.go()
    kinds = [event["event"] for event in run.lines()]
    assert kinds == ["start", "round", "resume", "round"]


def test_a_damaged_round_is_done_again_to_the_same_bits(make):
    run = make(training={"optimizer_state": "keep"})
    run.go()
    adapters, newest = run.adapters(), run.file(3)
    path = run.folder / "rounds" / "0003" / "global.safetensors"
    path.write_bytes(newest[:-1] + bytes([newest[-1] ^ 1]))
    run.go()
    assert run.of("fallback")
    assert run.adapters() == [*adapters, adapters[-1]]
    assert run.file(3) == newest
    rounds = [e for e in run.lines() if e["event"] == "round"]
    assert [e["round"] for e in rounds] == [1, 2, 3]
    assert [e["adapter_sha256"] for e in rounds] == adapters


@pytest.mark.parametrize("method", [name for name in METHODS if name != "lora"])
def test_every_method_runs_and_resumes(make, method):
    whole, pieces = (
        make(name, adapter={"method": method}, federation={"rounds": 2}) for name in "ab"
    )
    whole.go()
    for until in (1, 2):
        pieces.go(until)
    assert whole.adapters() == pieces.adapters()
    errors = [event["aggregation_error"] for event in whole.of("round")]
    if method == "dora":
        assert errors == [None, None]
    elif METHODS[method].affine:
        assert max(errors) < 1e-5
    else:
        assert max(errors) > 1e-5


def test_no_local_steps_leave_the_adapter_as_it_is(make):
    run = make(training={"local_steps": 0})
    run.go()
    assert len({run.file(number) for number in (2, 3)}) == 1
    assert [event["train_loss"] for event in run.of("round")] == [None] * 3
    assert all(event["aggregation_error"] == 0.0 for event in run.of("round"))


def test_the_start_event_says_what_the_run_is(make):
    run = make(scenario={"hostile": [{"kind": "nan", "clients": ["client-002"]}]})
    run.go(until=1)
    (start,) = run.of("start")
    assert start["num_trained"] == 2 * 2 * (16 + 16) + 2 * 16
    assert start["labels"] == ["bad", "good"]
    assert sum(c["train"] + c["validation"] for c in start["clients"].values()) == 40
    assert [c["hostile"] for c in start["clients"].values()] == [[], [], ["nan"]]
    assert start["num_test"] == len(run.loaded.data.test)
