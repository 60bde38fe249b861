"""Rounds that protect clients: what is paid, what is committed, and what is not told."""

import json
import math
import shutil
from dataclasses import replace

import pytest
import torch

from fedlora.errors import BudgetExhausted, LedgerError, QuorumFailed, StorageError, StrategyError
from fedlora.privacy.accounting import Event, epsilon, noise_for
from fedlora.privacy.client_level import Terms
from fedlora.privacy.ledger_file import set_aside
from fedlora.server.central_record import CentralRecord
from fedlora.server.client_privacy import run_private
from fedlora.server.private_rounds import Given
from fedlora.server.rounds import resume_state
from fedlora.strategies import STRATEGIES
from tests.server import toy
from tests.server.cases import random_state

TERMS = Terms(
    population=4,
    per_round=4,
    rounds=3,
    sampling="poisson",
    noise_multiplier=1e-9,
    clip=1e3,
    adaptive=False,
    epsilon=None,
    delta=1e-5,
    noise="test",
    solved=False,
)
PRIVATE = replace(TERMS, noise="os", noise_multiplier=2.0, population=40, per_round=2, epsilon=50.0)


class Private(toy.Run):
    """A toy run whose terms protect clients."""

    def __init__(self, folder, terms=TERMS, **settings):
        super().__init__(folder, **settings)
        self.terms = terms

    def go(self, until=None):
        committed = self.store.load()
        self.record = CentralRecord(self.terms, committed.record.get("privacy"))
        parts = replace(self.parts(), privacy=self.record)
        initial = self.strategy.init(random_state(self.spec))
        return run_private(parts, self.record, resume_state(committed, initial), until)

    @property
    def initial(self):
        return self.strategy.init(random_state(self.spec)).tensors

    def entries(self):
        (path,) = (self.store.folder / "privacy").glob("*/ledger*")
        lines = [json.loads(line.split("\t")[0]) for line in path.read_text().splitlines()]
        return [line for line in lines if "status" in line]


def deltas(run, clients):
    """What honest clients send from the start, by the plain loop."""
    start = run.initial
    for name in clients:
        plan = type("Plan", (), {"client": name})
        yield toy.honest(name, plan, start, start)


def moved(run, state):
    return {name: (state.tensors[name] - run.initial[name]).double() for name in run.initial}


@pytest.mark.parametrize("silent", [0, 1, 3, 4])
def test_the_mean_is_divided_by_the_expected_clients_whoever_answers(tmp_path, silent):
    run = Private(tmp_path / "run")
    gone = set(toy.NAMES[:silent])
    run.link.twist = lambda reply, plan: [] if plan.client in gone else [reply]
    state = run.go(1)
    sums = dict.fromkeys(run.initial, 0.0)
    for delta in deltas(run, toy.NAMES[silent:]):
        sums = {name: sums[name] + delta[name].double() for name in sums}
    for name, change in moved(run, state).items():
        expected = sums[name] / 4 if silent < 4 else torch.zeros_like(change)
        torch.testing.assert_close(change, expected, rtol=1e-5, atol=1e-5)


def test_a_client_that_claims_more_examples_counts_no_more(tmp_path):
    states = []
    for claimed in (10.0, 1e6):
        run = Private(tmp_path / str(claimed))
        run.link.change = lambda update, n=claimed: replace(
            update, num_examples=n if update.client == "ann" else 1.0
        )
        states.append(run.go(1))
    for name in run.initial:
        assert torch.equal(states[0].tensors[name], states[1].tensors[name])


def test_one_client_moves_the_mean_by_its_clip_norm_over_the_expected_clients(tmp_path):
    states = []
    for sent in (1.0, 1e3):
        run = Private(tmp_path / str(sent), replace(TERMS, clip=0.25))
        run.link.change = lambda update, factor=sent: (
            replace(
                update,
                delta=replace(
                    update.delta,
                    tensors={k: -factor * t for k, t in update.delta.tensors.items()},
                ),
            )
            if update.client == "ann"
            else update
        )
        states.append(run.go(1))
    quiet = Private(tmp_path / "quiet", replace(TERMS, clip=0.25))
    quiet.link.twist = lambda reply, plan: [] if plan.client == "ann" else [reply]
    without = moved(quiet, quiet.go(1))
    for state in states:
        difference = moved(run, state)
        square = sum(float(((difference[k] - without[k]) ** 2).sum()) for k in without)
        assert math.sqrt(square) == pytest.approx(0.25 / 4, rel=1e-4)


def test_a_rejected_update_is_a_zero_and_nobody_is_told(tmp_path):
    run = Private(tmp_path / "run")
    run.link.change = lambda update: (
        replace(
            update,
            delta=replace(
                update.delta,
                tensors={k: t * math.nan for k, t in update.delta.tensors.items()},
            ),
        )
        if update.client == "bob"
        else update
    )
    state = run.go(1)
    absent = Private(tmp_path / "absent")
    absent.link.twist = lambda reply, plan: [] if plan.client == "bob" else [reply]
    other = absent.go(1)
    for name in state.tensors:
        assert torch.equal(state.tensors[name], other.tensors[name])
    told = json.dumps([run.events, run.store.record(1)])
    assert not any(name in told for name in toy.NAMES)
    lines = [
        {k: v for k, v in line.items() if k != "seconds"} for line in (*run.events, *absent.events)
    ]
    assert lines[0] == lines[1]


def test_a_round_without_clients_commits_noise(tmp_path):
    terms = replace(TERMS, per_round=1, population=10**9, noise_multiplier=2.0)
    run = Private(tmp_path / "run", terms)
    state = run.go(1)
    assert run.link.manifests == []
    change = torch.cat([t.flatten() for t in moved(run, state).values()])
    assert float(change.std()) == pytest.approx(2e3, rel=5 / math.sqrt(2 * len(change)))


def test_clients_take_part_with_their_probability_and_follow_no_seed(tmp_path):
    terms = replace(PRIVATE, epsilon=None, population=10, per_round=1, rounds=3)
    counts, asked = [], []
    for i in range(2):
        run = Private(tmp_path / str(i), terms, rounds=3)
        run.link.ranks = {f"c{n:03d}": 2 for n in range(150)}
        run.go()
        asked.append(sorted(run.link.manifests))
        counts += [len(run.link.manifests)]
    assert asked[0] != asked[1]
    # 2 x 150 x 3 coins of 0.1; once in a million runs it is further off
    assert abs(sum(counts) - 90) < 5 * math.sqrt(900 * 0.1 * 0.9)


def test_fixed_sampling_takes_exactly_so_many(tmp_path):
    run = Private(tmp_path / "run", replace(TERMS, sampling="fixed", per_round=3))
    run.go()
    assert len(run.link.manifests) == 9
    assert run.terms.rate == 1.0


def test_the_quorum_counts_who_is_connected_before_anybody_is_chosen(tmp_path):
    run = Private(tmp_path / "run", PRIVATE, quorum=5)
    with pytest.raises(QuorumFailed, match="4 clients are connected; the quorum is 5"):
        run.go()
    assert [e["event"] for e in run.events] == ["abandoned", "abandoned"]
    assert run.entries() == []  # nobody was asked, and nothing is paid


def test_epsilon_of_a_round_is_that_of_all_rounds_so_far(tmp_path):
    run = Private(tmp_path / "run", PRIVATE)
    run.go()
    for count, event in enumerate(run.rounds(), 1):
        expected = epsilon([Event(0.05, 2.0, count)], 1e-5, "prv")
        assert event["epsilon"] == pytest.approx(expected, abs=1e-12)
    assert run.record.summary()["steps"] == 3
    assert run.record.summary()["epsilon"] == run.rounds()[-1]["epsilon"]


def test_noise_from_a_known_seed_never_has_an_epsilon(tmp_path):
    run = Private(tmp_path / "run", replace(PRIVATE, noise="test"))
    run.go()
    assert run.record.summary()["private"] is False
    assert run.record.summary()["epsilon"] is None
    assert [event["epsilon"] for event in run.rounds()] == [None] * 3


def test_the_run_ends_when_the_budget_is_spent_and_what_was_committed_stands(tmp_path):
    two = epsilon([Event(0.05, 2.0, 2)], 1e-5)
    run = Private(tmp_path / "run", replace(PRIVATE, epsilon=two))
    with pytest.raises(BudgetExhausted) as caught:
        run.go()
    assert caught.value.exit_code == 4
    assert run.store.load().round == 2
    assert len(run.rounds()) == 2


class Killed(BaseException):
    """Ends a run where a signal would."""


def killed_at(run, step):
    """Runs round 1 and part of round 2, up to a step of it."""
    run.go(1)
    before = run.link.exchange, run.store.commit

    def die(*args, **kwargs):
        raise Killed

    if step == "exchange":
        run.link.exchange = die
    else:
        run.store.commit = die
    with pytest.raises(Killed):
        run.go()
    run.link.exchange, run.store.commit = before


def test_a_round_that_died_before_its_release_is_paid_twice(tmp_path):
    run = Private(tmp_path / "run", PRIVATE)
    killed_at(run, "exchange")
    run.go()
    statuses = [entry["status"] for entry in run.entries()]
    assert statuses.count("RESERVED") == 4
    assert run.rounds()[-1]["epsilon"] == pytest.approx(epsilon([Event(0.05, 2.0, 4)], 1e-5, "prv"))


def test_a_round_that_died_after_its_release_is_committed_as_it_was_and_paid_once(tmp_path):
    run = Private(tmp_path / "run", PRIVATE)
    killed_at(run, "commit")
    asked = len(run.link.manifests)
    (path,) = (run.store.folder / "privacy").glob("*/releases/00000004")
    given = Given.from_bytes(path.read_bytes())
    before = run.store.load().tensors
    run.go(2)
    assert len(run.link.manifests) == asked  # nobody trained again
    for name, mean in given.mean.items():
        torch.testing.assert_close(run.store.load().tensors[name], before[name] + mean)
    run.go()
    assert [entry["status"] for entry in run.entries()].count("RESERVED") == 3


def test_solved_noise_grows_for_what_a_crash_lost_and_the_budget_holds(tmp_path):
    z = noise_for(3.0, 1e-5, 0.05, 3)
    terms = replace(PRIVATE, epsilon=3.0, noise_multiplier=z, solved=True)
    run = Private(tmp_path / "run", terms)
    killed_at(run, "exchange")
    run.go()
    used = [event["privacy"]["noise_multiplier"] for event in run.rounds()]
    assert used[0] == z
    assert used[1] == used[2] > z
    spent = [Event(0.05, z, 2), Event(0.05, used[1], 2)]
    assert 2.8 < epsilon(spent, 1e-5) <= 3.0


def test_a_lost_ledger_stops_the_run(tmp_path):
    run = Private(tmp_path / "run", PRIVATE)
    run.go(2)
    (ledger,) = (path.parent for path in (run.store.folder / "privacy").glob("*/ledger"))
    kept = tmp_path / "kept"
    ledger.rename(kept)
    with pytest.raises(LedgerError, match="is missing"):
        run.go()
    shutil.rmtree(ledger)
    kept.rename(ledger)
    # nor does a run go on with a new budget in the middle
    set_aside(ledger)
    with pytest.raises(LedgerError, match="has 0 rounds, but 2 are committed"):
        run.go()


def test_a_full_disk_loses_the_round_and_never_its_charge(tmp_path):
    run = Private(tmp_path / "run", PRIVATE)
    commit = run.store.commit

    def full(*args):
        raise StorageError("no space left")

    run.store.commit = full
    with pytest.raises(StorageError):
        run.go()
    run.store.commit = commit
    run.go()
    assert run.rounds()[-1]["epsilon"] == pytest.approx(epsilon([Event(0.05, 2.0, 3)], 1e-5, "prv"))


def test_an_adaptive_clip_norm_goes_on_where_it_stood(tmp_path):
    terms = replace(TERMS, adaptive=True, clip=1e-3, rounds=3)
    whole, halves = Private(tmp_path / "a", terms), Private(tmp_path / "b", terms)
    whole.go()
    for until in (1, 2, 3):
        halves.go(until)
    clips = [event["privacy"]["clip"] for event in whole.rounds()]
    assert clips == sorted(clips)
    assert clips[0] == 1e-3
    assert clips[1] > 1e-3
    assert clips == [event["privacy"]["clip"] for event in halves.rounds()]
    assert whole.rounds()[-1]["adapter_sha256"] == halves.rounds()[-1]["adapter_sha256"]


class Favours(STRATEGIES["fedit"]):
    """Starts one client from somewhere else."""

    name = "favours"

    def broadcast_key(self, state, client):
        return client.name == "cyd"

    def broadcast(self, state, client):
        start = super().broadcast(state, client)
        if client.name != "cyd":
            return start
        moved = {name: tensor + 1.0 for name, tensor in start.adapter.tensors.items()}
        return replace(start, adapter=replace(start.adapter, tensors=moved))


def test_clients_that_start_from_different_adapters_are_not_summed(tmp_path):
    run = Private(tmp_path / "run", strategy=Favours)
    with pytest.raises(StrategyError, match="client cyd is asked for something else"):
        run.go()


@pytest.mark.parametrize("strategy", ["fedit", "ffa-lora", "rolora", "fedsvd", "fed-sb"])
def test_every_strategy_makes_of_the_mean_what_it_makes_of_equal_clients(tmp_path, strategy):
    plain = toy.Run(
        tmp_path / "plain", strategy, limits=replace(toy.Limits(1e4, 1e7), uniform=True)
    )
    private = Private(tmp_path / "private", strategy=strategy)
    expected, found = plain.go(), private.go()
    for name in expected.tensors:
        torch.testing.assert_close(
            found.tensors[name], expected.tensors[name], rtol=1e-3, atol=1e-4
        )
