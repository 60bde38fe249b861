"""Whole runs under record-level privacy: clients trained together against one by one.

With privacy.noise = "test" both draw the same batches and the same noise.
"""

import json

import pytest
from safetensors.torch import load

from fedlora.privacy.ledger import Ledger
from fedlora.privacy.ledger_entry import decode_entry
from fedlora.simulation import cohort_rule
from fedlora.simulation.cohort import CohortLink
from fedlora.simulation.local import LocalLink
from fedlora.training.private_cohort import PrivateCohort
from tests.simulation.runs import Run

TEST = {"epsilon": 8.0, "delta": 1e-3, "noise": "test"}
CASES = {
    "fedit": {},
    "one factor at a time": {
        "federation": {"strategy": "rolora"},
        "training": {"optimizer_state": "keep"},
    },
    "folds": {"federation": {"strategy": "flora"}},
    "ranks": {"federation": {"strategy": "hetlora"}, "scenario": {"ranks": [2, 1, 2]}},
    "noisy figures": {"privacy": {**TEST, "metrics": "noisy"}},
    "small passes": {"training": {"batch_size": 3, "accumulation": 2}},
}


@pytest.fixture
def make(make_job, tmp_path):
    def make_run(name, cohort, **sections):
        job = make_job(run={"cohort": cohort}, **{"privacy": TEST, **sections})
        return Run(job, tmp_path / name)

    return make_run


def tensors(run):
    return load(run.file(run.of("round")[-1]["round"]))


def charges(run):
    """client -> what its ledger says, but for hashes and the clock."""
    found = {}
    for path in sorted((run.folder / "ledgers").glob("*/*/ledger")):
        entries = [decode_entry(line) for line in path.read_bytes().splitlines(True)[1:]]
        found[path.parts[-3]] = [
            (e.seq, e.status, e.reserved, e.release.round, e.release.attempt, e.events)
            for e in entries
        ]
    return found


def statements(run):
    """What every client said of its privacy, and its figures, by round."""
    found = []
    for replies in run.tap.replies:
        manifests = [json.loads(reply.manifest) for reply in replies]
        manifests.sort(key=lambda m: m["client"])
        found.append(
            [
                (m["client"], {k: v for k, v in m["privacy"].items() if k != "head"}, m["metrics"])
                for m in manifests
            ]
        )
    return found


def assert_same(alone, cohort):
    assert isinstance(alone.tap.link, LocalLink)
    assert isinstance(cohort.tap.link, CohortLink)
    found, expected = tensors(cohort), tensors(alone)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert float((found[name] - value).norm()) <= 1e-4 * float(value.norm()), name
    assert charges(cohort) == charges(alone)
    for mine, other in zip(statements(cohort), statements(alone), strict=True):
        for (name, privacy, figures), (other_name, other_privacy, others) in zip(
            mine, other, strict=True
        ):
            assert (name, privacy) == (other_name, other_privacy)
            assert figures == pytest.approx(others, rel=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_a_private_run_in_a_cohort_is_that_of_clients_one_by_one(make, case):
    alone, cohort = (make(cohort, cohort, **CASES[case]) for cohort in ("off", "auto"))
    alone.go()
    cohort.go()
    assert_same(alone, cohort)
    assert all(len(entries) == 2 * 3 for entries in charges(cohort).values())


def test_more_clients_than_fit_are_trained_in_groups(make, monkeypatch):
    monkeypatch.setattr(cohort_rule, "MOST_CLIENTS", 2)
    alone, cohort = (make(cohort, cohort, partition={"clients": 5}) for cohort in ("off", "auto"))
    alone.go()
    cohort.go()
    assert cohort.of("start")[0]["cohort"]["clients"] == 2
    assert_same(alone, cohort)


def test_secret_noise_is_new_in_every_run(make):
    runs = [make(name, "auto", privacy={"epsilon": 8.0, "delta": 1e-3}) for name in ("a", "b")]
    for run in runs:
        run.go(until=1)
    payloads = [reply.payload for run in runs for reply in run.tap.replies[0]]
    assert len(set(payloads)) == len(payloads) == 6


def test_what_is_reserved_is_reserved_before_any_client_trains(make, monkeypatch):
    run = make("run", "auto")
    seen = []
    train = PrivateCohort.train

    def watched(cohort):
        seen.append({name: [entry[1] for entry in es] for name, es in charges(run).items()})
        return train(cohort)

    monkeypatch.setattr(PrivateCohort, "train", watched)
    run.go(until=2)
    assert [set(map(tuple, round_.values())) for round_ in seen] == [
        {("RESERVED",)},
        {("RESERVED", "SPENT", "RESERVED")},
    ]


def test_who_dies_while_training_together_has_spent_every_reservation(make, monkeypatch):
    run = make("run", "auto", privacy={"noise_multiplier": 1.0, "delta": 1e-3})

    def dies(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(PrivateCohort, "_step", dies)
        with pytest.raises(KeyboardInterrupt):
            run.go(until=1)
    run.go(until=1)
    steps = [privacy["steps"] for _, privacy, _ in statements(run)[-1]]
    assert steps == [4, 4, 4]


def test_a_failure_is_every_clients_answer_and_its_reservation_stands(make, monkeypatch):
    run = make("run", "auto", federation={"retries": 0})

    def fails(*args, **kwargs):
        raise RuntimeError("the machine is on fire")

    monkeypatch.setattr(PrivateCohort, "_step", fails)
    with pytest.raises(Exception, match="round 1"):
        run.go(until=1)
    assert {event["detail"] for event in run.of("rejected")} == {
        "RuntimeError: the machine is on fire"
    }
    assert {tuple(e[1] for e in entries) for entries in charges(run).values()} == {("RESERVED",)}


def test_updates_that_were_made_together_are_sent_again_and_not_made_again(make, monkeypatch):
    run = make("run", "auto", privacy={"epsilon": 8.0, "delta": 1e-3})

    def dies(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("fedlora.server.rounds.merge", dies)
        with pytest.raises(KeyboardInterrupt):
            run.go(until=1)
    before, sent = charges(run), [reply.payload for reply in run.tap.replies[-1]]
    monkeypatch.setattr(PrivateCohort, "train", dies)
    run.go(until=1)
    assert [reply.payload for reply in run.tap.replies[-1]] == sent
    assert charges(run) == before


def test_a_client_whose_budget_is_spent_sits_out_alone(make, monkeypatch):
    """The ledger of one refuses; the others train as if it were absent."""
    reserve = Ledger.reserve
    alone, cohort = (
        make(cohort, cohort, federation={"quorum": 1, "rounds": 1}) for cohort in ("off", "auto")
    )

    def refuse(ledger, release, events, details=None):
        spent = [*events] * (1000 if "client-001" in str(ledger._file.folder) else 1)
        return reserve(ledger, release, spent, details)

    monkeypatch.setattr(Ledger, "reserve", refuse)
    for run in (alone, cohort):
        run.go()
        assert {event["code"] for event in run.of("rejected")} == {"BUDGET_EXHAUSTED"}
        assert [len(charges(run)[f"client-00{i}"]) for i in range(3)] == [2, 0, 2]
