"""Absent, slow, unequal and hostile clients."""

import itertools
import math

import pytest
import torch

from fedlora.config.job import ScenarioSection
from fedlora.data.example import Example
from fedlora.errors import ConfigError, QuorumFailed
from fedlora.simulation.scenario import Scenario
from fedlora.wire import decode_broadcast
from tests.server.cases import expectation, honest
from tests.simulation.runs import Run

NAMES = ["a", "b", "c", "d", "e", "f"]
BAD = "client-001"


def scenario(seed=0, cap=1e4, rank=4, **values):
    section = ScenarioSection.model_validate(values)
    return Scenario(section, NAMES, rank=rank, seed=seed, max_update_norm=cap)


def hostile(kind, **more):
    return {"hostile": [{"kind": kind, "clients": ["a", "b"], **more}]}


def an_update(client, seed=1, size=0.1):
    return honest(expectation(client=client), seed=seed, size=size)


def flat(update):
    return torch.cat([t.double().flatten() for _, t in sorted(update.delta.tensors.items())])


@pytest.fixture
def make(make_job, tmp_path):
    def make_run(name="run", clients=None, **sections):
        return Run(make_job(**sections), tmp_path / name, clients=clients)

    return make_run


def test_absence_is_drawn_by_name_round_and_attempt():
    one, two, other = scenario(dropout=0.4), scenario(dropout=0.4), scenario(seed=1, dropout=0.4)
    places = list(itertools.product(NAMES, range(50), (0, 1)))
    drawn = [one.absent(*place) for place in places]
    assert drawn == list(reversed([two.absent(*place) for place in reversed(places)]))
    assert drawn != [other.absent(*place) for place in places]
    # 600 draws: four standard deviations
    assert abs(sum(drawn) / len(drawn) - 0.4) < 4 * math.sqrt(0.24 / len(drawn))
    assert not any(scenario().absent(*place) for place in places)


def test_slow_clients_take_their_factor_longer():
    found = scenario(stragglers=0.5, slowdown=7.0, step_s=0.5)
    seconds = sorted(found.virtual_seconds(name, 4) for name in NAMES)
    assert seconds == [2.0] * 3 + [14.0] * 3


def test_ranks_are_taken_in_turn():
    assert [c.rank for c in scenario(ranks=[1, 4]).clients] == [1, 4] * 3
    assert [c.rank for c in scenario().clients] == [4] * 6


def test_scenarios_that_cannot_be_are_refused():
    with pytest.raises(ConfigError, match=r"scenario.ranks holds 5, more than adapter.rank = 4"):
        scenario(ranks=[1, 5])
    with pytest.raises(ConfigError, match="names client 'x', which does not exist"):
        scenario(hostile=[{"kind": "nan", "clients": ["x"]}])


def test_a_fraction_of_hostile_clients_is_drawn_by_seed():
    groups = {"hostile": [{"kind": "nan", "fraction": 0.5}]}
    chosen = [[name for name in NAMES if scenario(seed, **groups).kinds(name)] for seed in range(8)]
    assert all(len(names) == 3 for names in chosen)
    assert len({tuple(names) for names in chosen}) > 1


def test_an_honest_client_sends_what_it_has():
    update = an_update("c")
    assert scenario(**hostile("sign-flip")).tamper(update) is update


@pytest.mark.parametrize("strength", [1.0, 3.0])
def test_a_sign_flip_turns_the_update_round(strength):
    update = an_update("a")
    found = scenario(**hostile("sign-flip", strength=strength)).tamper(update)
    torch.testing.assert_close(flat(found), -strength * flat(update))


def test_scaling_stays_below_the_cap():
    update = an_update("a")
    norm = float(flat(update).norm())
    found = scenario(**hostile("scale", strength=10.0)).tamper(update)
    torch.testing.assert_close(flat(found), 10.0 * flat(update))
    found = scenario(cap=2 * norm, **hostile("scale", strength=10.0)).tamper(update)
    assert float(flat(found).norm()) == pytest.approx(0.99 * 2 * norm, rel=1e-5)
    zero = an_update("a", size=0.0)
    assert not flat(scenario(**hostile("scale")).tamper(zero)).any()


def test_a_shift_is_the_same_direction_for_all_who_collude():
    """Baruch et al. 1902.06156: small, common, and relative to the client's own update."""
    both = scenario(**hostile("shift", strength=0.5))
    updates = [an_update("a", seed=1), an_update("b", seed=2, size=3.0)]
    shifts = []
    for update in updates:
        moved = flat(both.tamper(update)) - flat(update)
        assert float(moved.norm() / flat(update).norm()) == pytest.approx(0.5, rel=1e-4)
        shifts.append(moved / moved.norm())
    torch.testing.assert_close(shifts[0], shifts[1], rtol=0, atol=1e-5)
    other = scenario(seed=1, **hostile("shift", strength=0.5))
    moved = flat(other.tamper(updates[0])) - flat(updates[0])
    assert abs(float(moved @ shifts[0] / moved.norm())) < 0.5


def test_attacks_do_not_change_the_honest_update_they_start_from():
    for kind in ("nan", "huge-norm", "wrong-shape", "replay", "sign-flip", "scale", "shift"):
        update = an_update("a")
        before = flat(update).clone()
        scenario(**hostile(kind)).tamper(update)
        assert torch.equal(flat(update), before)


@pytest.mark.parametrize("classes", [2, 5])
def test_flipped_labels_count_from_the_other_end(classes):
    examples = [Example({"input_ids": torch.ones(2)}, torch.tensor(c)) for c in range(classes)]
    flip = scenario(**hostile("label-flip"))
    assert [int(e.target) for e in flip.poison("a", examples, classes)] == [*range(classes)][::-1]
    assert flip.poison("c", examples, classes) is examples
    assert [int(e.target) for e in examples] == [*range(classes)]


def run_pair(make, kind, strategy="fedit", **more):
    """(a run with one hostile client, the run of the others alone)."""
    sections = {"federation": {"strategy": strategy, "quorum": 2}}
    group = {"kind": kind, "clients": [BAD], **more}
    attacked = make("attacked", scenario={"hostile": [group]}, **sections)
    attacked.go()
    rest = {k: v for k, v in attacked.loaded.data.clients.items() if k != BAD}
    alone = make("alone", clients=rest, **sections)
    alone.go()
    return attacked, alone


@pytest.mark.parametrize(
    ("kind", "code", "strategy"),
    [
        ("nan", "NOT_FINITE", "fedit"),
        ("nan", "NOT_FINITE", "ffa-lora"),
        ("huge-norm", "NORM", "fedit"),
        ("wrong-shape", "SIZE", "fedit"),
        ("replay", "STALE", "fedit"),
        ("replay", "STALE", "rolora"),
    ],
)
def test_an_attack_out_of_bounds_leaves_the_run_of_the_others_bit_for_bit(
    make, kind, code, strategy
):
    attacked, alone = run_pair(make, kind, strategy)
    assert [(e["client"], e["code"]) for e in attacked.of("rejected")] == [(BAD, code)] * 3
    assert attacked.adapters() == alone.adapters()
    assert attacked.file(3) == alone.file(3)
    for event in attacked.of("round"):
        assert (event["rejected"], event["missing"]) == (1, [])
        assert BAD not in event["clients"]


@pytest.mark.parametrize("kind", ["sign-flip", "scale", "shift", "label-flip"])
def test_an_attack_within_bounds_is_admitted_and_changes_the_result(make, kind):
    attacked, alone = run_pair(make, kind, strength=3.0)
    clean = make("clean")
    clean.go()
    assert not attacked.of("rejected")
    assert all(BAD in event["clients"] for event in attacked.of("round"))
    assert len({*attacked.adapters(), *alone.adapters(), *clean.adapters()}) == 9


def test_absent_clients_are_missing_and_the_rest_goes_on(make):
    run = make(scenario={"dropout": 0.4}, federation={"quorum": 1, "rounds": 6})
    run.go()
    missing = [event["missing"] for event in run.of("round")]
    assert any(missing)
    for event, replies in zip(run.of("round"), run.tap.replies, strict=True):
        present = {reply.client for reply in replies}
        assert set(event["clients"]) == present
        assert present | set(event["missing"]) == set(run.loaded.data.clients)
        assert event["bytes_up"] == sum(len(r.manifest) + len(r.payload) for r in replies)


def test_a_straggler_misses_the_deadline_and_sends_nothing(make):
    sections = {"federation": {"quorum": 2, "deadline_s": 10.0}}
    slow = {"stragglers": 0.34, "slowdown": 100.0}
    run = make(scenario=slow, **sections)
    run.go()
    (late,) = run.of("round")[0]["missing"]
    assert all(event["missing"] == [late] for event in run.of("round"))
    assert not run.of("rejected")
    rest = {k: v for k, v in run.loaded.data.clients.items() if k != late}
    alone = make("alone", clients=rest, **sections)
    alone.go()
    assert run.adapters() == alone.adapters()
    patient = make("patient", scenario=slow, federation={"quorum": 2, "deadline_s": 1e6})
    patient.go()
    assert not any(event["missing"] for event in patient.of("round"))


def test_a_round_below_quorum_is_abandoned_and_tried_again(make):
    run = make(scenario={"dropout": 0.5}, federation={"quorum": 3, "retries": 50})
    run.go()
    abandoned = run.of("abandoned")
    assert abandoned
    assert all(len(event["clients"]) == 3 for event in run.of("round"))
    assert [e["event"] for e in run.lines()].count("abandoned") == len(abandoned)


def test_a_run_without_enough_clients_stops_where_it_stands(make):
    run = make(scenario={"dropout": 0.999}, federation={"retries": 2})
    with pytest.raises(QuorumFailed, match="failed after 3 attempts: 0 of 3 clients") as caught:
        run.go()
    assert caught.value.exit_code == 3
    assert len(run.of("abandoned")) == 3
    assert not run.of("round")
    assert sorted(p.name for p in (run.folder / "rounds").iterdir()) == ["0000"]
    assert not (run.folder / "spool.bin").exists()


@pytest.mark.parametrize("strategy", ["ffa-lora", "rolora"])
def test_unequal_ranks_train_and_merge_exactly(make, strategy):
    run = make(scenario={"ranks": [2, 1]}, federation={"strategy": strategy, "rounds": 4})
    run.go()
    plans = [decode_broadcast(task.manifest).plan for task in run.tap.tasks[0]]
    assert [plan.rank for plan in plans] == [2, 1, 2]
    assert not run.of("rejected")
    assert all(event["aggregation_error"] < 1e-5 for event in run.of("round"))
    small = {len(r.payload) for replies in run.tap.replies for r in replies if r.client == BAD}
    large = {len(r.payload) for replies in run.tap.replies for r in replies if r.client != BAD}
    assert max(small) < max(large)


NESTED = """
from fedlora.strategies.fedit import FedIT


class Nested(FedIT):
    name = "nested"
    exact = True
    hetero_rank = True
"""


def test_lora_xs_of_unequal_ranks_trains_merges_exactly_and_resumes(make, tmp_path):
    """Each client works with the leading slots of the one basis that all of them received."""
    (tmp_path / "nested.py").write_text(NESTED)
    sections = {
        "adapter": {"method": "lora-xs", "rank": 4},
        "scenario": {"ranks": [4, 1, 3]},
        "federation": {"strategy": f"{tmp_path / 'nested.py'}:Nested", "rounds": 4},
    }
    whole, pieces = make("whole", **sections), make("pieces", **sections)
    whole.go()
    for until in (1, 4):
        pieces.go(until)
    assert whole.adapters() == pieces.adapters()
    assert len(set(whole.adapters())) == 4
    assert not whole.of("rejected")
    assert all(event["aggregation_error"] < 1e-5 for event in whole.of("round"))
    sizes = {r.client: len(r.payload) for replies in whole.tap.replies for r in replies}
    assert len(set(sizes.values())) == 3


def test_unequal_ranks_are_refused_by_factor_averaging(make):
    run = make(scenario={"ranks": [2, 1]})
    with pytest.raises(ConfigError, match="needs equal ranks"):
        run.go()
    assert not run.folder.exists()
