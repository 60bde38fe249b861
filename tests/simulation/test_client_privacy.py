"""Whole runs that protect clients: epsilon, refusals, what they leave, and resumes."""

import json

import dp_accounting
import pytest
from dp_accounting.pld import PLDAccountant

from fedlora.checkpoint import RunStore
from fedlora.config.load import dump_job
from fedlora.errors import BudgetExhausted, ConfigError
from fedlora.privacy.accounting import noise_for
from fedlora.report.run_page import write_report
from fedlora.simulation.federation import Federation
from fedlora.simulation.results import finish
from tests.cli.command import fedlora
from tests.simulation.runs import Run, loaded_for

# q = 1: every client takes part in every round
PRIVATE = {"unit": "client", "epsilon": 6.0, "clip_norm": 0.5}
SAMPLED = {**PRIVATE, "population": 60}
ONE = {"clients_per_round": 1}


@pytest.fixture
def make(make_job, tmp_path):
    def make_run(name="run", privacy=PRIVATE, **sections):
        job = make_job(privacy=privacy, **sections)
        return Run(job, tmp_path / name)

    return make_run


def pld(rate, noise, steps, delta):
    """Google's accountant, by privacy loss distributions."""
    accountant = PLDAccountant()
    step = dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(noise))
    accountant.compose(dp_accounting.SelfComposedDpEvent(step, steps))
    return accountant.get_epsilon(delta)


def test_epsilon_is_that_of_another_accountant_and_within_the_budget(make):
    run = make(privacy=SAMPLED, federation=ONE)
    run.go(1)
    run.go()
    z = noise_for(6.0, 1e-5, 1 / 60, 3)
    for count, event in enumerate(run.of("round"), 1):
        found = event["privacy"]
        assert (found["noise_multiplier"], found["delta"], found["steps"]) == (z, 1e-5, count)
        assert event["epsilon"] <= 6.0
        assert event["train_loss"] is None
    spent = [event["epsilon"] for event in run.of("round")]
    assert spent == sorted(spent)
    assert spent[-1] == pytest.approx(pld(1 / 60, z, 3, 1e-5), abs=0.05)
    assert "more clients per round" in run.of("warning")[0]["why"]


def test_what_is_left_of_a_run_says_what_was_promised_and_names_no_client(make):
    run = make()
    run.go()
    store = RunStore.open(run.folder, run.job.digest())
    federation = Federation(run.job, run.loaded)
    state = federation.run(store)  # as a process that finds every round committed
    finish(federation, store, state)
    store.close()
    card = " ".join((run.folder / "adapter" / "README.md").read_text().split())
    page = write_report(run.folder).read_text()
    spent = f"({run.of('round')[-1]['epsilon']:.3g}, 1e-05)-differential privacy for one client"
    for text in (card, page):
        for words in (
            spent,
            "add or remove all data of one client",
            "3 of 3 clients expected in a round (poisson sampling)",
            "clip norm 0.5",
            "3 noisy steps",
            "trusted: the server",
            "not covered:",
        ):
            assert words.lower() in text.lower()
    assert "no reply" not in page
    for number in (1, 2, 3):
        record = (run.folder / "rounds" / f"{number:04d}" / "round.json").read_text()
        assert "client-0" not in record


def test_test_noise_is_marked_and_gives_the_same_run_twice(make):
    privacy = {**PRIVATE, "noise": "test", "adaptive_clip": True}
    first, second = make("a", privacy), make("b", privacy)
    first.go()
    second.go(1)
    second.go()
    assert first.adapters() == second.adapters()
    assert [event["epsilon"] for event in first.of("round")] == [None] * 3
    assert not first.of("round")[-1]["privacy"]["private"]


def test_two_private_runs_of_one_job_draw_different_noise(make):
    first, second = make("a"), make("b")
    first.go(1)
    second.go(1)
    assert first.adapters() != second.adapters()


def test_a_spent_budget_ends_the_command_with_4_and_keeps_what_was_committed(
    make, tmp_path, monkeypatch, capsys
):
    run = make(
        privacy={
            "unit": "client",
            "epsilon": 6.0,
            "noise_multiplier": 0.9,
            "client_sampling": "fixed",
        }
    )
    path = tmp_path / "job.toml"
    path.write_text(dump_job(run.job))
    done = fedlora(monkeypatch, capsys, "simulate", path, "--out", tmp_path / "out", "--json")
    assert done.code == 4
    assert "budget" in done.err
    lines = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    rounds = [event for event in map(json.loads, lines) if event["event"] == "round"]
    assert 1 <= len(rounds) < 3
    assert all(event["epsilon"] <= 6.0 for event in rounds)
    assert fedlora(monkeypatch, capsys, "resume", tmp_path / "out", "--json").code == 4


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"federation": {"strategy": "fedex-lora"}}, 'privacy.unit = "client" is voided'),
        ({"federation": {"wrappers": [{"name": "krum"}]}}, 'voided by wrapper "krum"'),
        ({"federation": {"wrappers": [{"name": "scaffold"}]}}, "scaffold"),
        (
            {"federation": {"wrappers": [{"name": "norm-cap", "cap": 1.0}]}},
            "looks at updates one by one",
        ),
        ({"federation": {"mode": "async", "buffer": 1}}, "async"),
        ({"scenario": {"ranks": [2, 1]}}, "ranks"),
        ({"privacy": {**PRIVATE, "metrics": "noisy"}}, "privacy.metrics"),
        ({"privacy": {**PRIVATE, "population": 2}}, "there are 3 clients"),
        ({"privacy": {**PRIVATE, "delta": 0.5}}, "privacy.delta is 0.5"),
    ],
)
def test_what_would_void_it_is_refused_before_round_1(make, sections, words):
    run = make(**sections)
    with pytest.raises(ConfigError) as caught:
        Federation(run.job, loaded_for(run.job))
    assert words.replace('"', "'") in str(caught.value).replace('"', "'")


def test_a_budget_that_no_noise_fits_is_refused_before_round_1(make):
    with pytest.raises(BudgetExhausted):
        make(privacy={**PRIVATE, "epsilon": 1e-7}).go()


@pytest.mark.parametrize(
    "sections",
    [
        {"federation": {"strategy": "fedsa-lora"}},
        {"federation": {"strategy": "flwr:FedAdam"}},
        {"federation": {"wrappers": [{"name": "fedadam"}, {"name": "fedprox"}]}},
        {"compression": {"up": "int8", "top_k": 0.25, "down": "bf16"}},
        {"training": {"optimizer_state": "keep"}},
        {"scenario": {"dropout": 0.5, "hostile": [{"kind": "nan", "clients": ["client-000"]}]}},
        {"privacy": {**PRIVATE, "client_sampling": "fixed", "noise": "secure"}},
        {"privacy": SAMPLED, "federation": ONE},
    ],
)
def test_what_keeps_the_guarantee_runs(make, sections):
    run = make(**sections)
    run.go()
    assert len(run.of("round")) == 3
    assert run.of("round")[-1]["epsilon"] <= 6.0
    assert run.of("rejected") == []


def test_no_amplification_needs_more_noise(make):
    runs = [
        make(s, {**SAMPLED, "client_sampling": s}, federation=ONE) for s in ("poisson", "fixed")
    ]
    for run in runs:
        run.go(1)
    poisson, fixed = (run.of("round")[0]["privacy"] for run in runs)
    assert fixed["noise_multiplier"] == noise_for(6.0, 1e-5, 1.0, 3)
    assert fixed["noise_multiplier"] > poisson["noise_multiplier"]
    assert "counts twice" in fixed["adjacency"]
