"""Buffered asynchronous rounds: whole runs, staleness, resumes, and the algebra of one merge."""

from dataclasses import replace

import pytest
import torch

from fedlora.adapter import AdapterState
from fedlora.errors import ConfigError, QuorumFailed
from fedlora.server.buffered import rebased
from tests.simulation.runs import Run
from tests.strategies.rounds import change, cohort, distance, make, mean_change, merged

SLOW = {"stragglers": 0.5, "slowdown": 4.0, "step_s": 1.0}


@pytest.fixture
def make_run(make_job, tmp_path):
    def build(name="run", scenario=SLOW, federation=None, **sections):
        federation = {"mode": "async", "buffer": 2, "rounds": 5, **(federation or {})}
        job = make_job(federation=federation, scenario=scenario, **sections)
        return Run(job, tmp_path / name)

    return build


def test_slow_clients_come_in_stale_and_the_clock_runs(make_run):
    run = make_run()
    run.go()
    rounds = run.of("round")
    assert [len(e["staleness"]) for e in rounds] == [2] * 5
    assert {s for e in rounds for _, s in e["staleness"]} >= {0, 1}
    clocks = [e["clock_s"] for e in rounds]
    assert clocks == sorted(clocks)
    assert clocks[-1] > clocks[0]
    assert len(set(run.adapters())) == 5


@pytest.mark.parametrize("strategy", ["fedit", "ffa-lora", "fed-sb"])
def test_a_run_may_be_resumed_after_every_merge(make_run, strategy):
    """Clients at work across the interruption go on with the version they started from."""
    scenario = {**SLOW, "dropout": 0.2}
    sections = {"federation": {"strategy": strategy}, "training": {"optimizer_state": "keep"}}
    if strategy == "fed-sb":
        sections["adapter"] = {"method": "lora-xs"}
        scenario["ranks"] = [2, 1]
    whole, pieces = (make_run(n, scenario, **sections) for n in ("whole", "pieces"))
    whole.go()
    for until in range(1, 6):
        pieces.go(until)
    assert whole.adapters() == pieces.adapters()
    assert [e["staleness"] for e in whole.of("round")] == [
        e["staleness"] for e in pieces.of("round")
    ]


def test_everybody_in_step_is_federated_averaging(make_run):
    """No staleness, K = n, rate 1: the plain mean of all clients."""
    federation = {"strategy": "ffa-lora", "weighting": "uniform", "rounds": 3}
    synchronous = make_run("sync", {}, {**federation, "mode": "sync"})
    buffered = make_run("async", {}, {**federation, "buffer": 3})
    states = [run.go() for run in (synchronous, buffered)]
    assert distance(*(state.tensors for state in states)) < 1e-6
    assert all(s == 0 for e in buffered.of("round") for _, s in e["staleness"])


def test_a_client_that_is_too_far_behind_is_not_waited_for(make_run):
    scenario = {**SLOW, "slowdown": 1000.0}
    run = make_run(scenario=scenario, federation={"buffer": 1, "max_staleness": 1, "rounds": 6})
    run.go()
    stale = [e for e in run.of("rejected") if e["code"] == "STALE"]
    assert stale
    assert all("max_staleness is 1" in e["detail"] for e in stale)
    assert all(s <= 1 for e in run.of("round") for _, s in e["staleness"])


def test_clients_that_never_answer_end_the_run_with_a_reason(make_run):
    run = make_run(scenario={"dropout": 0.999}, federation={"retries": 1})
    with pytest.raises(QuorumFailed, match=r"of 2 updates in the buffer and no client at work"):
        run.go()
    assert len(run.of("abandoned")) == 1


def test_a_buffer_larger_than_the_federation_is_refused(make_run):
    with pytest.raises((ConfigError, ValueError), match=r"federation\.buffer = 9 is more than"):
        make_run(federation={"buffer": 9})


@pytest.mark.parametrize("strategy", ["rolora"])
def test_strategies_that_cannot_merge_older_versions_are_refused(make_run, strategy):
    with pytest.raises(ConfigError, match='mode = "async" does not fit strategy'):
        make_run(federation={"strategy": strategy}).go()


def stale_updates(chosen, old, present, weights):
    adapter = chosen.global_delta(present)
    return [
        rebased(chosen, adapter, up, w) for up, w in zip(cohort(chosen, old), weights, strict=True)
    ]


def test_a_merge_adds_the_damped_changes_and_divides_by_their_number():
    """theta + sum_i w_i u_i / K, and not / sum_i w_i."""
    weights = (1.0, 2**-0.5, 0.5, 3**-0.5)
    chosen, old, basis = make("ffa-lora")
    tensors = {k: v + 0.25 if k.endswith(".B") else v for k, v in old.tensors.items()}
    present = replace(old, tensors=tensors, round=1)
    found = merged(chosen, present, stale_updates(chosen, old, present, weights))
    ups = cohort(chosen, old)
    for name in ups[0].delta.tensors:
        mean = sum(w * up.delta.tensors[name] for w, up in zip(weights, ups, strict=True)) / 4
        torch.testing.assert_close(found[name], present.tensors[name].double() + mean)
    # the same in the weight change, which is linear in B
    changes = change(present.spec, found, basis)
    base = change(present.spec, present.tensors, basis)
    then = change(old.spec, old.tensors, basis)
    for layer in changes:
        moved = sum(
            w * (mean_change([up], basis)[layer] - then[layer])
            for w, up in zip(weights, ups, strict=True)
        )
        torch.testing.assert_close(changes[layer], base[layer] + moved / 4, rtol=1e-9, atol=1e-9)


def test_the_order_within_the_buffer_changes_nothing():
    chosen, old, _ = make("fedit")
    ups = stale_updates(chosen, old, replace(old, round=3), (1.0, 0.7, 0.5, 0.3))
    assert distance(merged(chosen, old, ups[::-1]), merged(chosen, old, ups)) < 1e-12


def test_a_small_client_leaves_the_slots_it_does_not_hold():
    chosen, old, _ = make("ffa-lora", rank=4)
    ups = [
        rebased(chosen, chosen.global_delta(old), up, 1.0)
        for up in cohort(chosen, old, (1, 1, 1, 1))
    ]
    found = merged(chosen, old, ups)
    for layer in old.spec.layers:
        b = f"{layer.name}.B"
        torch.testing.assert_close(found[b][:, 1:], old.tensors[b][:, 1:].double())
        assert not torch.equal(found[b][:, :1], old.tensors[b][:, :1].double())


def test_products_of_different_versions_add_in_the_weight_change():
    """theta + sum_i w_i (s B_i A_i - s B_v A_v) / K, dense float64."""
    chosen, old, basis = make("fedit")
    chosen.regauges = True
    other = make("fedit")[1]
    present = replace(other, tensors={k: 1.5 * v for k, v in other.tensors.items()}, round=2)
    weights = (1.0, 0.7, 0.5, 0.3)
    ups = cohort(chosen, old)
    stale = stale_updates(chosen, old, present, weights)
    stacks = chosen.stacks(present, stale)
    base = change(present.spec, present.tensors, basis)
    then = change(old.spec, old.tensors, basis)
    for layer in present.spec.layers:
        left, right = stacks[layer.name]
        moved = sum(
            w * (mean_change([up], basis)[layer.name] - then[layer.name])
            for w, up in zip(weights, ups, strict=True)
        )
        torch.testing.assert_close(left @ right, base[layer.name] + moved / 4)


def test_an_older_update_weighs_less(make_run):
    """The weight is (1 + staleness)^(-1/2), seen in a merge of one update."""
    chosen, old, _ = make("ffa-lora")
    (up,) = cohort(chosen, old)[:1]
    norms = []
    for staleness in range(4):
        moved = rebased(chosen, chosen.global_delta(old), up, (1 + staleness) ** -0.5)
        norms.append(float(moved.delta.tensors["p.B"].norm()))
    assert norms == sorted(norms, reverse=True)
    assert norms[3] == pytest.approx(norms[0] / 2)
    assert isinstance(moved.delta, AdapterState)
