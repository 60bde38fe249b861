"""Whole runs of a tiny model under record-level privacy."""

import json
import math
from dataclasses import replace

import pytest
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent
from dp_accounting.pld import PLDAccountant

from fedlora.checkpoint import RunStore
from fedlora.client.site import Site
from fedlora.errors import BudgetExhausted, ConfigError, FedloraError, LedgerError
from fedlora.privacy.ledger import Ledger
from fedlora.strategies import STRATEGIES
from fedlora.wire import encode_update
from tests.simulation.runs import Run, loaded_for

PRIVATE = {"epsilon": 8.0, "delta": 1e-3}
# without a seed: two equal runs give different adapters
TEST = {**PRIVATE, "noise": "test"}
METHOD_OF = {"fed-sb": "lora-xs"}


@pytest.fixture
def make(make_job, tmp_path):
    def make_run(name="run", **sections):
        return Run(make_job(**sections), tmp_path / name)

    return make_run


def rounds(run):
    return run.of("round")


def ledgers(run):
    """client -> lines of its ledger."""
    found = {}
    for path in sorted((run.folder / "ledgers").glob("*/*/ledger")):
        found[path.parts[-3]] = path.read_text().splitlines()
    return found


def test_epsilon_is_what_google_says_of_the_steps_that_were_taken(make):
    run = make(privacy=PRIVATE)
    run.go()
    last = rounds(run)[-1]["privacy"]
    examples = {name: len(data.train) for name, data in run.federation.clients.items()}
    worst = 0.0
    for reply in run.tap.replies[-1]:
        manifest = json.loads(reply.manifest)
        noise = GaussianDpEvent(manifest["privacy"]["noise_multiplier"])
        step = PoissonSampledDpEvent(4 / examples[manifest["client"]], noise)
        truth = PLDAccountant().compose(SelfComposedDpEvent(step, 3 * 2)).get_epsilon(1e-3)
        assert truth - 0.001 <= manifest["privacy"]["epsilon"] <= truth + 0.02
        worst = max(worst, manifest["privacy"]["epsilon"])
    assert last["steps"] == 6
    assert rounds(run)[-1]["epsilon"] == worst <= 8.0
    spent = [event["epsilon"] for event in rounds(run)]
    assert spent == sorted(spent)
    assert spent[0] > 0


def test_noise_is_new_in_every_run_and_the_same_only_under_test(make):
    private = [make(name, privacy=PRIVATE) for name in ("a", "b")]
    tested = [make(name, privacy=TEST) for name in ("c", "d")]
    for run in (*private, *tested):
        run.go()
    assert private[0].adapters()[-1] != private[1].adapters()[-1]
    assert tested[0].adapters() == tested[1].adapters()


def test_a_test_run_never_says_an_epsilon(make):
    run = make(privacy=TEST)
    run.go()
    assert all(event["epsilon"] is None for event in rounds(run))
    assert not any(event["privacy"]["private"] for event in rounds(run))
    for reply in run.tap.replies[-1]:
        assert json.loads(reply.manifest)["privacy"]["epsilon"] is None


@pytest.mark.parametrize(
    "strategy", [name for name, kind in STRATEGIES.items() if "record" in kind.privacy]
)
def test_every_strategy_that_keeps_the_guarantee_runs(make, strategy):
    sections = {
        "federation": {"strategy": strategy, "rounds": 2},
        "adapter": {"method": METHOD_OF.get(strategy, "lora")},
        "privacy": TEST,
    }
    whole, pieces = make("whole", **sections), make("pieces", **sections)
    whole.go()
    for until in (1, 2):
        pieces.go(until)
    assert len(set(whole.adapters())) == 2
    assert whole.adapters() == pieces.adapters()
    assert not whole.of("rejected")
    assert all(len(lines) == 1 + 2 * 2 for lines in ledgers(whole).values())


def test_a_strategy_that_voids_the_guarantee_is_refused_before_the_first_round(make):
    with pytest.raises(ConfigError, match=r'privacy.unit = "record" is voided by .*lora-a2'):
        make(federation={"strategy": "lora-a2"}, privacy=PRIVATE).go()


def test_nothing_that_was_not_noised_is_said(make):
    run = make(privacy=PRIVATE)
    run.go()
    assert all(event["train_loss"] is None for event in rounds(run))
    for replies in run.tap.replies:
        for reply in replies:
            assert json.loads(reply.manifest)["metrics"] == {}


def test_noisy_figures_are_paid_for(make):
    silent, noisy = make("a", privacy=PRIVATE), make("b", privacy={**PRIVATE, "metrics": "noisy"})
    for run in (silent, noisy):
        run.go()
    figures = json.loads(noisy.tap.replies[0][0].manifest)["metrics"]
    assert figures.keys() == {"validation_loss", "validation_accuracy"}
    assert all(math.isfinite(value) for value in figures.values())
    needed = [rounds(run)[-1]["privacy"]["noise_multiplier"] for run in (silent, noisy)]
    assert needed[1] > needed[0]
    assert rounds(noisy)[-1]["epsilon"] <= 8.0


def test_a_spent_budget_ends_the_run_and_the_committed_rounds_stand(make):
    first = make("first", privacy={"noise_multiplier": 1.0, "delta": 1e-3})
    first.go(until=2)
    # enough for two rounds and not for three; the gate is the coarser accountant
    budget = 1.25 * rounds(first)[-1]["epsilon"]
    run = make("run", privacy={"noise_multiplier": 1.0, "delta": 1e-3, "epsilon": budget})
    with pytest.raises(BudgetExhausted, match="budget of the run") as stopped:
        run.go()
    assert stopped.value.exit_code == 4
    done = rounds(run)[-1]["round"]
    assert 1 <= done < 3
    store = RunStore.open(run.folder, run.job.digest())
    assert store.load().round == done
    store.close()
    assert {event["code"] for event in run.of("rejected")} == {"BUDGET_EXHAUSTED"}
    # no release after the budget, ever: again and again nothing is trained
    before = ledgers(run)
    with pytest.raises(BudgetExhausted):
        run.go()
    assert ledgers(run) == before


def test_an_update_that_was_made_is_sent_again_and_not_made_again(make, monkeypatch):
    """The server dies after every client has answered and before the commit."""
    run = make(privacy=PRIVATE, federation={"rounds": 1})
    sent = []
    work = Site.work

    def watched(site, *args, **kwargs):
        update = work(site, *args, **kwargs)
        sent.append(encode_update(update))
        return update

    monkeypatch.setattr(Site, "work", watched)

    def dies(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("fedlora.server.rounds.merge", dies)
        with pytest.raises(KeyboardInterrupt):
            run.go()
    before = ledgers(run)
    run.go()
    assert len(sent) == 6
    assert sent[:3] == sent[3:]
    assert ledgers(run) == before
    assert len(rounds(run)) == 1


def test_a_client_that_dies_in_training_has_spent_what_it_reserved(make, monkeypatch):
    run = make(privacy={"noise_multiplier": 1.0, "delta": 1e-3}, federation={"rounds": 1})

    def dies(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Ledger, "spend", dies)
        with pytest.raises(KeyboardInterrupt):
            run.go()
    run.go()
    first = min(run.federation.clients)
    manifests = [json.loads(reply.manifest) for reply in run.tap.replies[-1]]
    steps = {found["client"]: found["privacy"]["steps"] for found in manifests}
    # the first client had trained once in vain; the others had not begun
    assert steps == {name: 4 if name == first else 2 for name in steps}


def test_a_ledger_that_was_touched_stops_the_run_with_advice(make):
    run = make(privacy=PRIVATE)
    run.go(until=1)
    (path,) = (run.folder / "ledgers" / min(run.federation.clients)).glob("*/ledger")
    text = path.read_bytes()
    path.write_bytes(text.replace(b"SPENT", b"VOIDX"))
    with pytest.raises(LedgerError):
        run.go()
    path.unlink()
    with pytest.raises(LedgerError):
        run.go()


def test_two_clients_with_the_same_data_are_refused(make_job, tmp_path):
    job = make_job(privacy=PRIVATE)
    loaded = loaded_for(job)
    first, second, *_ = loaded.data.clients.values()
    clients = {first.name: first, second.name: replace(second, records=first.records)}
    with pytest.raises(ConfigError, match="have the same data"):
        Run(job, tmp_path / "run", loaded, clients).go()


@pytest.mark.parametrize(
    ("sections", "part"),
    [
        ({"run": {"engine": "ray"}}, "keeps no privacy ledgers|keep no privacy ledgers"),
        ({"privacy": {**PRIVATE, "delta": 0.2}}, "privacy.delta is 0.2 with"),
        (
            {
                "privacy": {**PRIVATE, "per_sample": "hooks"},
                "training": {"gradient_checkpointing": True},
            },
            "Opacus' hooks do not see",
        ),
        ({"training": {"compile": True}}, "set training.compile = false"),
        ({"training": {"length_bucketed": True}}, "set training.length_bucketed = false"),
    ],
)
def test_what_voids_the_promise_is_refused(make, sections, part):
    run = make(**{"privacy": PRIVATE, **sections})
    with pytest.raises(FedloraError, match=part):
        run.go()


def test_packing_is_refused(make_job):
    from fedlora.privacy.judge import check_private

    job = make_job(model={"task": "causal-lm"}, privacy=PRIVATE)
    with pytest.raises(ConfigError, match=r"data.packed = true: .* set data.packed = false"):
        check_private(job)
