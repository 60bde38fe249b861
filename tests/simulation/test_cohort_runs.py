"""Whole runs whose clients are trained together against runs that train them one by one."""

import pytest
import torch
from safetensors.torch import load

from fedlora.models.loaded import load as load_all
from fedlora.simulation import cohort_rule
from fedlora.simulation.cohort import CohortLink
from fedlora.simulation.local import LocalLink
from tests.simulation.runs import Run

CASES = {
    "fedit": {},
    "heads and moments": {"training": {"optimizer_state": "keep"}},
    "one factor at a time": {
        "federation": {"strategy": "rolora"},
        "training": {"optimizer_state": "keep"},
    },
    "folds": {"federation": {"strategy": "flora"}},
    "own factors": {"federation": {"strategy": "fedsa-lora"}},
    "ranks": {
        "federation": {"strategy": "hetlora"},
        "scenario": {"ranks": [2, 1, 2]},
    },
    "slots": {"federation": {"strategy": "lora-a2"}, "scenario": {"ranks": [2, 1, 1]}},
    "control variates": {
        "federation": {"wrappers": [{"name": "scaffold"}]},
        "training": {"optimizer": "sgd", "learning_rate": 0.1},
    },
    "proximal term": {"federation": {"wrappers": [{"name": "fedprox"}]}},
    "trouble": {
        "scenario": {"dropout": 0.3, "hostile": [{"kind": "sign-flip", "clients": ["client-001"]}]},
        "federation": {"quorum": 1},
    },
    "coded updates": {"compression": {"up": "int8"}},
    "dropout": {"adapter": {"dropout": 0.3}},
    "like lengths": {"training": {"length_bucketed": True}},
    "DoRA": {"adapter": {"method": "dora"}},
}


@pytest.fixture
def both(make_job, tmp_path):
    """The same job, one by one and together."""

    def make(**sections):
        run = sections.pop("run", {})
        alone = Run(make_job(run={**run, "cohort": "off"}, **sections), tmp_path / "alone")
        cohort = Run(make_job(run={**run, "cohort": "auto"}, **sections), tmp_path / "cohort")
        return alone, cohort

    return make


def tensors(run):
    return load(run.file(run.of("round")[-1]["round"]))


def start_of(run):
    return run.of("start")[0]["cohort"]


def assert_close(alone, cohort, tolerance=1e-4):
    found, expected = tensors(cohort), tensors(alone)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert float((found[name] - value).norm()) <= tolerance * float(value.norm()), name


@pytest.mark.parametrize("case", CASES)
def test_a_run_in_a_cohort_is_that_of_clients_one_by_one(both, case):
    """The tolerance is that of three rounds of float32; a step is compared in float64 elsewhere."""
    alone, cohort = both(**CASES[case])
    alone.go()
    cohort.go()
    assert isinstance(alone.tap.link, LocalLink)
    assert isinstance(cohort.tap.link, CohortLink)
    assert start_of(alone)["clients"] == 1
    assert start_of(cohort)["clients"] > 1
    assert_close(alone, cohort)
    rounds = [run.of("round") for run in (alone, cohort)]
    for mine, other in zip(*rounds, strict=True):
        for key in ("admitted", "missing", "bytes_down", "attempts"):
            assert mine.get(key) == other.get(key), key


def test_a_cohort_goes_on_where_it_was_cut_off(both):
    whole, pieces = both(training={"optimizer_state": "keep"}, run={"cohort": "auto"})
    whole.job = pieces.job
    whole.go()
    for until in (1, 2, None):
        pieces.go(until)
    assert pieces.adapters() == whole.adapters()


def test_more_clients_than_fit_are_trained_in_groups(both, monkeypatch):
    monkeypatch.setattr(cohort_rule, "MOST_CLIENTS", 2)
    alone, cohort = both(partition={"clients": 5})
    alone.go()
    cohort.go()
    assert start_of(cohort)["clients"] == 2
    assert_close(alone, cohort)


def test_a_client_that_diverges_does_so_alone(both):
    """A row of a pass that is not finite touches no other row."""
    alone, cohort = both(
        training={"learning_rate": 1e-2},
        scenario={"hostile": [{"kind": "nan", "clients": ["client-000"]}]},
        federation={"quorum": 1},
    )
    alone.go()
    cohort.go()
    codes = [[e["code"] for e in run.of("rejected")] for run in (alone, cohort)]
    assert codes[0] == codes[1] == ["NOT_FINITE"] * 3
    assert_close(alone, cohort)


@pytest.mark.parametrize(
    ("sections", "why"),
    [
        ({"adapter": {"method": "bone-col"}}, "for every client"),
        ({"privacy": {"epsilon": 8.0, "per_sample": "hooks"}}, "sees the examples of one client"),
        ({"federation": {"mode": "async", "buffer": 2}}, "asynchronous"),
    ],
)
def test_what_cannot_be_trained_together_is_not_and_says_why(both, sections, why):
    _, cohort = both(**sections)
    cohort.go(1)
    assert start_of(cohort)["clients"] == 1
    assert why in start_of(cohort)["why"]
    assert not isinstance(cohort.tap.link, CohortLink)


def test_large_clients_are_trained_by_themselves(both, monkeypatch):
    monkeypatch.setattr(cohort_rule, "MOST_WORK", 1.0)
    _, cohort = both()
    cohort.go(1)
    assert "faster by itself" in start_of(cohort)["why"]


def test_on_a_gpu_a_pass_ends_at_a_size_of_its_own(make_job, monkeypatch):
    job = make_job(run={"cohort": "auto"})
    loaded = load_all(job)
    monkeypatch.setattr(cohort_rule, "MOST_WORK", 1.0)
    assert cohort_rule.cohort_width(job, loaded).clients == 1
    on_gpu = job.model_copy(update={"run": job.run.model_copy(update={"device": "cuda:0"})})
    assert cohort_rule.cohort_width(on_gpu, loaded).clients > 1
    monkeypatch.setattr(cohort_rule, "FULL_GPU_PASS", 1.0)
    assert cohort_rule.cohort_width(on_gpu, loaded).clients == 1


def test_a_run_with_the_ops_turned_off_is_the_same(both, monkeypatch):
    alone, cohort = both()
    monkeypatch.setenv("FEDLORA_OPS", "torch")
    alone.go()
    monkeypatch.delenv("FEDLORA_OPS")
    cohort.go()
    assert_close(alone, cohort)
    assert torch.get_num_threads() == 1
