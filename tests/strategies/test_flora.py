"""FLoRA against the dense mean; Wang et al. 2409.05976, section 3."""

from dataclasses import replace

import pytest
import torch

from fedlora.adapter import with_rank
from fedlora.adapters import METHODS
from fedlora.messages import RoundPlan
from fedlora.strategies.base import ClientInfo
from fedlora.strategies.fold import folds
from tests.strategies.rounds import change, ended_with, make
from tests.strategies.stacked import (
    base_change,
    clients,
    far,
    from_start,
    given_to,
    mean_of,
    own,
    step,
)


def seed_of(chosen, state):
    plan = RoundPlan("run", state.round + 1, 0, "ann", (), 2, 1)
    return chosen.plan(state, ClientInfo("ann", 2), plan).fresh


@pytest.mark.parametrize("ranks", [(4, 4, 4), (1, 2, 4), (1, 1, 1)])
@pytest.mark.parametrize("method", ["lora", "rslora"])
def test_the_base_gains_the_exact_mean_of_every_round(method, ranks):
    chosen, state, _ = make("flora", method, rank=4)
    for number in range(4):
        updates = clients(chosen, state, ranks, seed=10 * number)
        before = base_change(state)
        ideal = {k: before[k] + v for k, v in mean_of(updates).items()}
        state = step(chosen, state, updates)
        assert far(base_change(state), ideal) < 1e-6
        wide = chosen.global_delta(state)
        assert far(change(wide.spec, wide.tensors, {}), ideal) < 1e-6


def test_clients_of_other_scales_count_with_their_own():
    """s_i B_i A_i of adapters that were trained with alpha / r_i each."""
    chosen, state, _ = make("flora", rank=4)
    updates = []
    for up, scale in zip(clients(chosen, state, (1, 2, 4)), (8.0, 4.0, 2.0), strict=True):
        layers = tuple(replace(layer, scale=scale) for layer in up.delta.spec.layers)
        spec = replace(up.delta.spec, layers=layers)
        updates.append(replace(up, delta=replace(up.delta, spec=spec)))
    assert far(base_change(step(chosen, state, updates)), mean_of(updates)) < 1e-6


def test_weighting_both_factors_is_not_the_mean():
    """Why p_i is on one of them only; the same check as above must tell them apart."""
    chosen, state, _ = make("flora")
    updates = clients(chosen, state)
    total = sum(up.weight for up in updates)
    twice = {
        layer.name: sum(
            (up.weight / total) ** 2 * change(up.delta.spec, ended_with(up), {})[layer.name]
            for up in updates
        )
        for layer in state.spec.layers
    }
    assert far(base_change(step(chosen, state, updates)), twice) > 0.1


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_every_round_starts_from_fresh_factors_that_the_client_can_draw(rank):
    """B = 0, A from the plan's seed, another one each round; one more version of the base."""
    chosen, state, _ = make("flora", rank=4)
    seeds = [seed_of(chosen, state)]
    for number in range(1, 4):
        state = step(chosen, state, clients(chosen, state, seed=number))
        seeds.append(seed_of(chosen, state))
        tensors, product = given_to(chosen, state, rank)
        for layer in state.spec.layers:
            drawn = METHODS["lora"].fresh(layer, seeds[-1])
            assert torch.equal(tensors[f"{layer.name}.A"], drawn["A"][:rank])
            assert not product[layer.name].any()
        assert not own(state)["p"].any()
        assert f"{number:04d}" in folds(state.tensors)
    assert seeds[0] == state.spec.seed
    assert len(set(seeds)) == 4
    # of the run as well
    other = replace(state, spec=replace(state.spec, seed=1))
    assert seed_of(chosen, other) != seeds[-1]


def test_clients_receive_the_product_and_not_the_stack():
    """Rank at most min(d, k), and no client's own factor among the columns or rows."""
    chosen, state, _ = make("flora", rank=4)
    updates = clients(chosen, state)
    new = step(chosen, state, updates)
    for layer in state.spec.layers:
        left = new.tensors[f"fold.0001.{layer.name}.L"].double()
        right = new.tensors[f"fold.0001.{layer.name}.Q"].double()
        assert right.shape[0] == min(layer.out, layer.inp) < 12
        for up in updates:
            for part, factor in ((left, f"{layer.name}.B"), (right.T, f"{layer.name}.A")):
                theirs = ended_with(up)[factor]
                theirs = theirs if factor.endswith("B") else theirs.T
                cosines = (part / part.norm(dim=0)).T @ (theirs / theirs.norm(dim=0))
                assert float(cosines.abs().max()) < 1 - 1e-6


def test_the_order_of_the_clients_is_irrelevant():
    chosen, state, _ = make("flora", rank=4)
    updates = clients(chosen, state, (1, 2, 4))
    turned = [replace(up, client=f"z-{up.client}") for up in reversed(updates)]
    found = [base_change(step(chosen, state, ups)) for ups in (updates, turned)]
    assert far(*found) < 1e-6


def test_a_client_that_missed_rounds_reaches_the_same_base():
    """What it fetches is what it lacks: the versions it holds keep their names and bytes."""
    chosen, state, _ = make("flora", rank=1)
    ideal, held = base_change(state), {}
    for number in (0, 1, 2):
        updates = clients(chosen, state, seed=10 * number)[:1]
        ideal = {k: ideal[k] + v for k, v in mean_of(updates).items()}
        state = step(chosen, state, updates)
        start = chosen.broadcast(state, ClientInfo("late", 1))
        held = held or start.fold["0001"]
    assert list(start.fold) == ["0001", "0002", "0003"]
    assert all(torch.equal(start.fold["0001"][k], held[k]) for k in held)
    for name, dense in ideal.items():
        base = sum(f[f"{name}.L"].double() @ f[f"{name}.Q"].double() for f in start.fold.values())
        assert float((base - dense).norm() / dense.norm()) < 1e-6


def test_a_round_without_any_change_folds_nothing():
    chosen, state, _ = make("flora")
    state = from_start(state)
    new = step(chosen, state, clients(chosen, state, size=0.0))
    assert not folds(new.tensors)
    assert new.round == 1
    assert with_rank(chosen.global_delta(new).spec, 2) == state.spec
