"""Runs by secure aggregation: the same adapter as without, and a server that sees only sums."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from fedlora.errors import ConfigError, QuorumFailed, StrategyError
from fedlora.privacy.secagg.work import work_digest
from fedlora.simulation.baselines import run_local
from fedlora.strategies.fedit import FedIT
from fedlora.wire import (
    decode_broadcast,
    decode_own,
    decode_update_manifest,
    encode_broadcast,
    encode_tensors,
)
from tests.simulation.runs import Run, Tap, loaded_for

METHOD_OF = {"fed-sb": "lora-xs"}
LINEAR = ["fedit", "ffa-lora", "rolora", "fedsvd", "fedsa-lora", "fed-sb"]


@pytest.fixture
def make(make_job, tmp_path):
    def make_run(name="run", *, secure=True, **sections):
        federation = {"secure_aggregation": secure, **sections.pop("federation", {})}
        return Run(make_job(federation=federation, **sections), tmp_path / name)

    return make_run


def tensors(run, number):
    path = run.folder / "rounds" / f"{number:04d}" / "global.safetensors"
    return decode_own(path.read_bytes())


def go(run, tap, **arguments):
    """Like Run.go, through another kind of tap."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tests.simulation.runs.Tap", tap)
        return run.go(**arguments)


@pytest.mark.parametrize("strategy", LINEAR)
def test_the_adapter_is_that_of_the_plain_run(make, strategy):
    """But for rounding to clip / 2^48 = 3.6e-11, far below float32 beside entries of 1e-2."""
    sections = {
        "federation": {"strategy": strategy, "rounds": 1},
        "adapter": {"method": METHOD_OF.get(strategy, "lora")},
    }
    plain, secure = make("plain", secure=False, **sections), make("secure", **sections)
    plain.go()
    secure.go()
    left, right = tensors(plain, 1), tensors(secure, 1)
    start = tensors(secure, 0)
    moved = False
    for name in left:
        # one unit in the last place of float32, where means fall on two sides of a border
        torch.testing.assert_close(left[name], right[name], rtol=2e-6, atol=1e-9)
        moved |= not torch.equal(right[name], start[name])
    assert moved
    ours, theirs = secure.of("round")[0], plain.of("round")[0]
    assert ours["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-6)
    assert ours["clients"] == theirs["clients"]
    assert ours["secure_aggregation"] == {"asked": 3, "threshold": 2, "bits": 64, "saturated": 0}
    assert ours["aggregation_error"] is None


@pytest.mark.parametrize(("bits", "norm"), [(32, 1.0), (32, 1e4), (64, 1e4)])
def test_the_mean_is_off_by_less_than_a_level(make, bits, norm):
    """Of one round of fedit, whose adapter is the mean: the documented bound, entry by entry."""
    sections = {
        "federation": {
            "rounds": 1,
            "weighting": "uniform",
            "secure_bits": bits,
            "max_update_norm": norm,
        }
    }
    plain, secure = make("plain", secure=False, **sections), make("secure", **sections)
    plain.go()
    secure.go()
    left, right = tensors(plain, 1), tensors(secure, 1)
    level = norm / min(2**48, (2 ** (bits - 1) - 1) // 3)
    gaps = [(left[name].double() - right[name].double()).abs().max() for name in left]
    # beside it, one rounding to float32 of each of two entries below 1
    assert max(gaps) < level + 2.0**-23
    # the coarse one is coarse, so that the bound is one of this code
    if (bits, norm) == (32, 1e4):
        assert max(gaps) > level / 100


def test_repeats_and_resumed_runs_have_the_same_bits(make):
    sections = {"federation": {"rounds": 3, "quorum": 2}, "scenario": {"dropout": 0.3}}
    sections["partition"] = {"clients": 5}
    whole, pieces = make("whole", **sections), make("pieces", **sections)
    whole.go()
    for until in (1, 2, 3):
        pieces.go(until)
    assert whole.adapters() == pieces.adapters()
    assert whole.file(3) == pieces.file(3)
    assert any(event["missing"] for event in whole.of("round"))


@pytest.mark.parametrize("weighting", ["examples", "uniform"])
def test_drop_outs_leave_the_mean_of_those_who_sent(make, weighting):
    """As in the plain run with the same drop-outs, which come after shares were dealt."""
    sections = {
        "partition": {"clients": 5},
        "federation": {"rounds": 2, "quorum": 1, "weighting": weighting},
        "scenario": {"dropout": 0.3},
    }
    plain, secure = make("plain", secure=False, **sections), make("secure", **sections)
    plain.go()
    secure.go()
    for ours, theirs in zip(secure.of("round"), plain.of("round"), strict=True):
        assert ours["clients"] == theirs["clients"]
        assert ours["missing"] == theirs["missing"]
    assert any(event["missing"] for event in secure.of("round"))
    for name, tensor in tensors(plain, 2).items():
        torch.testing.assert_close(tensor, tensors(secure, 2)[name], rtol=1e-4, atol=1e-6)
    record = json.loads((secure.folder / "rounds" / "0002" / "round.json").read_bytes())
    assert set(record["weights"]) == set(secure.of("round")[1]["clients"])
    assert (set(record["weights"].values()) == {1.0}) == (weighting == "uniform")


@pytest.mark.parametrize("step", ["advertise", "share", "sign", "reveal"])
def test_a_client_that_falls_silent_at_any_step_costs_no_round(make, step):
    run = make(federation={"rounds": 1, "quorum": 1}, partition={"clients": 4})
    name = sorted(loaded_for(run.job).data.clients)[1]

    class Silent(Tap):
        def ask(self, at, messages):
            for reply in self.link.ask(at, messages):
                if (at, reply.client) != (step, name):
                    yield reply

    go(run, Silent)
    (event,) = run.of("round")
    assert (name in event["clients"]) == (step in ("sign", "reveal"))
    assert (name in event["missing"]) == (step in ("advertise", "share"))
    assert not run.of("abandoned")


def test_below_the_threshold_a_round_is_tried_again_without_training_again(make):
    """And never ends with a sum over fewer."""
    run = make(federation={"rounds": 1, "retries": 2}, partition={"clients": 4})
    worked = []

    def work(federation):
        def counted(client, manifest, fetch):
            worked.append(client)
            return federation._work(client, manifest, fetch)

        return counted

    class Silent(Tap):
        def exchange(self, tasks, parts, deadline_s):
            first = not self.tasks
            for i, reply in enumerate(super().exchange(tasks, parts, deadline_s)):
                if not first or i < 2:
                    yield reply

    go(run, Silent, work=work)
    (abandoned,) = run.of("abandoned")
    assert "2 of 4 clients have sent a vector; secure aggregation needs 3" in abandoned["why"]
    assert len(run.of("round")) == 1
    assert sorted(worked) == sorted(set(worked))


def test_a_sum_that_was_signed_cannot_be_called_off(make):
    """The next attempt would be over other clients: each refuses, and the run stops."""
    run = make(federation={"rounds": 1, "retries": 1}, partition={"clients": 4})
    names = sorted(loaded_for(run.job).data.clients)

    class CalledOff(Tap):
        attempts = 0

        def ask(self, step, messages):
            self.attempts += step == "advertise"
            for reply in self.link.ask(step, messages):
                lost = names[1:] if step == "reveal" and self.attempts == 1 else ()
                lost = names[:1] if step == "advertise" and self.attempts == 2 else lost
                if reply.client not in lost:
                    yield reply

    with pytest.raises(QuorumFailed):
        go(run, CalledOff)
    refused = run.of("rejected")
    assert {event["client"] for event in refused} == set(names[1:])
    assert all("second sum of round 1" in event["detail"] for event in refused)


def test_the_server_is_sent_no_update_and_no_figure(make):
    """What crosses the link: vectors unlike any update, and manifests without metrics."""
    run = make(federation={"rounds": 1})
    updates = {}

    def work(federation):
        def kept(client, manifest, fetch):
            updates[client] = federation._work(client, manifest, fetch)
            return updates[client]

        return kept

    run.go(work=work)
    (replies,) = run.tap.replies
    assert {reply.client for reply in replies} == set(updates)
    for reply in replies:
        fields = decode_update_manifest(reply.manifest)
        assert fields["metrics"] == {}
        assert fields["size_bytes"] == len(encode_tensors({}))
        delta = updates[reply.client].delta.tensors
        flat = torch.cat([delta[name].reshape(-1) for name in sorted(delta)]).double().numpy()
        seen = np.frombuffer(reply.payload, np.int64)[: flat.size].astype(float)
        assert abs(np.corrcoef(flat, seen)[0, 1]) < 6 / np.sqrt(flat.size)
        # uniform, where an update that is not masked has only small integers
        assert np.abs(seen).mean() == pytest.approx(2**62, rel=6 / np.sqrt(flat.size))
    record = json.loads((run.folder / "rounds" / "0001" / "round.json").read_bytes())
    assert record["client_metrics"] == {name: {} for name in updates}


def test_values_that_are_not_finite_stay_out(make):
    run = make(
        federation={"rounds": 1, "quorum": 2},
        partition={"clients": 4},
        scenario={"hostile": [{"kind": "nan", "fraction": 0.25}]},
    )
    run.go()
    (rejected,) = run.of("rejected")
    assert "holds NaN or infinity" in rejected["detail"]
    assert len(run.of("round")[0]["clients"]) == 3
    assert all(torch.isfinite(tensor).all() for tensor in tensors(run, 1).values())


def test_a_huge_update_is_clamped_and_counted_but_not_kept_out(make):
    run = make(
        federation={"rounds": 1, "max_update_norm": 0.5},
        partition={"clients": 4},
        scenario={"hostile": [{"kind": "huge-norm", "fraction": 0.25}]},
    )
    run.go()
    (event,) = run.of("round")
    assert len(event["clients"]) == 4
    start, end = tensors(run, 0), tensors(run, 1)
    entries = sum(tensor.numel() for tensor in end.values())
    assert 0 < event["secure_aggregation"]["saturated"] <= entries
    assert max(float((end[name] - start[name]).abs().max()) for name in end) <= 0.5


@pytest.mark.parametrize(
    ("sections", "problem"),
    [
        ({"federation": {"strategy": "flora"}}, "'flora', which needs more than a weighted sum"),
        ({"federation": {"strategy": "lora-a2"}}, "lets every client send other slots"),
        ({"federation": {"wrappers": [{"name": "norm-cap", "cap": 1.0}]}}, "single updates"),
        ({"federation": {"wrappers": [{"name": "krum"}]}}, "wrapper 'krum', which looks at"),
        (
            {
                "federation": {"wrappers": [{"name": "scaffold"}]},
                "training": {"optimizer": "sgd"},
            },
            "'scaffold', which counts clients",
        ),
        (
            {"federation": {"strategy": "rolora"}, "scenario": {"ranks": [2, 1]}},
            r"ranks \[1, 2\]",
        ),
        ({"run": {"engine": "ray"}}, 'engine = "local" only'),
        ({"partition": {"kind": "natural", "column": "label", "clients": 0}}, "there are 2"),
    ],
)
def test_what_needs_single_updates_is_refused_before_round_1(make, sections, problem):
    run = make(**sections)
    with pytest.raises(ConfigError, match=problem):
        run.go()
    assert not run.folder.exists()


@pytest.mark.parametrize(
    ("sections", "problem"),
    [
        ({"federation": {"mode": "async"}}, '"async" has none'),
        ({"compression": {"up": "int8"}}, "compression.up"),
        ({"compression": {"top_k": 0.5}}, "compression.up"),
        ({"federation": {"secure_bits": 32}}, "no room for weights"),
        ({"partition": {"clients": 2}}, "there are 2"),
        ({"partition": {"clients": 65}}, "there are 65"),
        ({"privacy": {"unit": "client", "epsilon": 1.0}}, "clips at the server"),
    ],
)
def test_what_does_not_go_together_is_refused_with_the_job(make, sections, problem):
    with pytest.raises(ValueError, match=problem):
        make(**sections)


def test_wrappers_that_need_the_mean_alone_are_taken(make):
    wrappers = [{"name": "fedmomentum"}, {"name": "fedprox"}]
    sections = {"federation": {"rounds": 2, "wrappers": wrappers}}
    plain, secure = make("plain", secure=False, **sections), make("secure", **sections)
    plain.go()
    secure.go()
    for name, tensor in tensors(plain, 2).items():
        torch.testing.assert_close(tensor, tensors(secure, 2)[name], rtol=1e-4, atol=1e-6)


def test_clients_that_are_asked_for_other_work_refuse(make):
    """A server that has all but one do nothing would read the one update off the sum."""
    run = make(federation={"rounds": 1, "retries": 0}, partition={"clients": 4})

    class Lying(Tap):
        def exchange(self, tasks, parts, deadline_s):
            yield from super().exchange([tasks[0], *map(idle, tasks[1:])], parts, deadline_s)

    def idle(task):
        broadcast = decode_broadcast(task.manifest)
        plan = dataclasses.replace(broadcast.plan, local_steps=0)
        return dataclasses.replace(
            task, manifest=encode_broadcast(dataclasses.replace(broadcast, plan=plan))
        )

    with pytest.raises(QuorumFailed, match="1 of 4 clients have sent a vector"):
        go(run, Lying)
    refused = run.of("rejected")
    assert len(refused) == 3
    assert all("asked for other work than the session" in event["detail"] for event in refused)


def test_a_strategy_with_unequal_plans_ends_the_run(make, monkeypatch):
    plan = FedIT.plan

    def uneven(self, state, client, blank):
        made = plan(self, state, client, blank)
        return dataclasses.replace(made, local_steps=1 + (client.name > "client-001"))

    monkeypatch.setattr(FedIT, "plan", uneven)
    with pytest.raises(StrategyError, match="sums updates of one plan and one start"):
        make().go()


def test_a_client_knows_its_session_by_its_job_and_broadcast(make):
    """What names the work: everything but the client itself."""
    run = make(federation={"rounds": 1})
    run.go()
    tasks = run.tap.tasks[0]
    digests = {work_digest("job", decode_broadcast(task.manifest)) for task in tasks}
    assert len(digests) == 1
    broadcast = decode_broadcast(tasks[0].manifest)
    others = {work_digest("other job", broadcast)}
    for change in ({"attempt": 1}, {"local_steps": 9}, {"rates": {"A": 0.0}}, {"factors": ("A",)}):
        plan = dataclasses.replace(broadcast.plan, **change)
        others.add(work_digest("job", dataclasses.replace(broadcast, plan=plan)))
    parts = dict.fromkeys(broadcast.parts, "0" * 64)
    others.add(work_digest("job", dataclasses.replace(broadcast, parts=parts)))
    assert len(others) == 6
    assert not others & digests


def test_the_baseline_of_each_client_alone_is_no_sum(make):
    """A federation of one client cannot be secure; its adapter is that of a plain job."""
    found = {}
    for secure in (False, True):
        run = make(secure=secure, federation={"rounds": 1})
        found[secure] = run_local(run.job, loaded_for(run.job), run.folder / str(secure))
    assert found[True] == found[False]
