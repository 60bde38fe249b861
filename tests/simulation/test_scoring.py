"""Clients' adapters scored together in whole runs against the same runs that take each alone."""

import dataclasses
import json
import weakref

import pytest

from fedlora.checkpoint import RunStore
from fedlora.simulation import cohort_rule
from fedlora.simulation.baselines import run_local
from fedlora.simulation.cohort_rule import evaluation_width
from fedlora.simulation.results import finish
from fedlora.simulation.scoring import Judged, score_each
from tests.simulation.runs import Run

CASES = {
    "own factors": {"federation": {"strategy": "fedsa-lora"}},
    "DoRA": {"adapter": {"method": "dora"}},
    "text": {"model": {"task": "causal-lm"}, "federation": {"strategy": "fedsa-lora"}},
    "asynchronous": {"federation": {"mode": "async", "buffer": 2}},
    "unequal": {"partition": {"kind": "dirichlet", "alpha": 0.3, "clients": 4}},
}


@pytest.fixture
def make(make_job, tmp_path):
    def make_run(name, cohort="auto", **sections):
        sections = {
            **sections,
            "training": {"learning_rate": 0.1, "local_steps": 3},
            "evaluation": {
                "baselines": ["local"],
                "batch_size": 2,
                **sections.pop("evaluation", {}),
            },
            "federation": {"rounds": 1, **sections.get("federation", {})},
            "run": {"cohort": cohort},
        }
        return Run(make_job(**sections), tmp_path / name)

    return make_run


def finished(run):
    state = run.go()
    store = RunStore.open(run.folder, run.job.digest())
    try:
        return finish(run.federation, store, state)
    finally:
        store.close()


def leaves(tree, path=()):
    """Every number of nested figures by where it is."""
    if isinstance(tree, dict):
        return {k: v for key, part in tree.items() for k, v in leaves(part, (*path, key)).items()}
    if isinstance(tree, list):
        return {k: v for i, part in enumerate(tree) for k, v in leaves(part, (*path, i)).items()}
    return {path: tree}


@pytest.mark.parametrize("case", CASES)
def test_a_run_says_the_same_of_its_adapters_together_and_one_by_one(make, monkeypatch, case):
    """With the adapters of one run, so that only the scoring differs."""
    # the training is one by one in both
    monkeypatch.setattr("fedlora.simulation.federation.cohort_width", _alone)
    expected = finished(make("alone", "off", **CASES[case]))
    run = make("together", **CASES[case])
    found = finished(run)
    (start,) = run.of("start")
    assert start["evaluation_cohort"]["clients"] > 1
    expected, found = leaves(expected), leaves(found)
    assert found.keys() == expected.keys()
    for place, value in expected.items():
        # a difference of scores is as exact as they are
        wanted = pytest.approx(value, rel=1e-5, abs=1e-5) if isinstance(value, float) else value
        assert found[place] == wanted, place


def _alone(job, loaded):
    return cohort_rule.Width(1, "")


@pytest.mark.parametrize("cohort", ["off", "auto"])
def test_global_and_own_are_side_by_side_on_the_same_data(make, cohort):
    run = make("run", cohort, federation={"strategy": "fedsa-lora"})
    summary = finished(run)
    data = run.loaded.data.clients
    assert summary["side_by_side"].keys() == {"personal", "local"}
    for kind, rows in summary["side_by_side"].items():
        assert [(row["client"], row["examples"]) for row in rows] == [
            (name, len(client.validation)) for name, client in data.items()
        ]
        for row in rows:
            clients = summary["clients"][row["client"]]
            assert row["global"] == clients["global"]
            if kind == "personal":
                assert row["own"] == clients["personal"]
            assert row["own"] != row["global"]
            for key, value in row["difference"].items():
                assert value == row["own"][key] - row["global"][key]
    events = [json.loads(line) for line in (run.folder / "metrics.jsonl").open()]
    assert events[-1]["event"] == "end"
    assert events[-1]["side_by_side"] == summary["side_by_side"]


def test_without_own_adapters_there_is_nothing_beside_the_global_one(make):
    summary = finished(make("run", evaluation={"baselines": []}))
    assert summary["side_by_side"] == {}


@pytest.mark.parametrize("cohort", ["off", "auto"])
def test_a_client_alone_scores_as_the_run_of_that_client(make, tmp_path, cohort):
    run = make("run", cohort)
    found = run_local(run.job, run.loaded, tmp_path / "local")
    job = run.job.model_copy(
        update={"training": run.job.training.model_copy(update={"optimizer_state": "keep"})}
    )
    for name, data in run.loaded.data.clients.items():
        single = Run(job, tmp_path / name, run.loaded, clients={name: data})
        state = single.go()
        expected = single.of("round")[-1]["eval"]
        assert found["clients"][name] == pytest.approx(expected, rel=1e-5)
        store = RunStore.open(single.folder, job.digest())
        own = finish(single.federation, store, state)["clients"][name]["global"]
        store.close()
        assert found["own"][name] == pytest.approx(own, rel=1e-5)


def test_scores_of_clients_alone_are_kept_and_made_again_where_they_are_lost(make, tmp_path):
    run = make("run")
    folder = tmp_path / "local"
    first = run_local(run.job, run.loaded, folder)
    path = folder / "client-001" / "scores.json"
    kept = path.read_bytes()
    path.unlink()
    again = run_local(run.job, run.loaded, folder)
    assert leaves(again) == pytest.approx(leaves(first), rel=1e-5)
    assert json.loads(path.read_bytes()).keys() == json.loads(kept).keys()
    other = {"test": {"accuracy": 0.125}, "own": {}}
    path.write_text(json.dumps(other))
    assert run_local(run.job, run.loaded, folder)["clients"]["client-001"] == other["test"]


@pytest.mark.parametrize(
    ("sections", "why"),
    [
        ({"adapter": {"method": "bone-col"}}, "for every client"),
        (
            {"model": {"task": "causal-lm"}, "evaluation": {"exact_match": True}},
            "one adapter at a time",
        ),
        ({"cohort": "off"}, 'run.cohort = "off"'),
    ],
)
def test_what_cannot_be_scored_together_is_not_and_says_why(make, sections, why):
    run = make("run", **sections)
    summary = finished(run)
    (start,) = run.of("start")
    assert start["evaluation_cohort"]["clients"] == 1
    assert why in start["evaluation_cohort"]["why"]
    assert summary["side_by_side"]["local"]


def test_no_more_adapters_are_in_memory_than_are_scored_together(make, monkeypatch):
    """And a client without an example is scored like the others, with nothing."""
    monkeypatch.setattr(cohort_rule, "MOST_CLIENTS", 2)
    run = make("run", federation={"strategy": "fedsa-lora"})
    run.go()
    assert evaluation_width(run.job, run.loaded).clients == 2
    initial, test = run.loaded.initial, run.loaded.data.test
    made, most = [], 0

    def adapter():
        nonlocal most
        new = dataclasses.replace(initial)
        made.append(weakref.ref(new))
        most = max(most, sum(one() is not None for one in made))
        return new

    data = [test[:2], [], test[2:4], test[:1], test[1:2]]
    found = score_each(run.federation, [Judged(adapter, examples) for examples in data])
    assert most == 2
    assert [bool(scores) for scores in found] == [True, False, True, True, True]
    run.federation.hold(initial)
    for examples, scores in zip(data, found, strict=True):
        assert scores == pytest.approx(run.federation.scores(examples), rel=1e-5)
