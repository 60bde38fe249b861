"""FedEx-LoRA against the dense mean; Singhal et al. 2410.09432, section 4."""

from dataclasses import replace

import pytest
import torch

from fedlora.adapters import METHODS
from fedlora.errors import ConfigError
from fedlora.strategies.base import ClientInfo
from fedlora.strategies.fedex_lora import FedExLora
from fedlora.strategies.fold import folds
from tests.strategies.rounds import change, make
from tests.strategies.stacked import (
    base_change,
    clients,
    far,
    from_start,
    mean_factor,
    mean_of,
    own,
    step,
)


def whole(state):
    """layer -> change of the base and the adapter together."""
    base, adapter = base_change(state), own(state)
    return {name: base[name] + adapter[name] for name in base}


def cross_term(updates, state):
    """layer -> T - s B A of the mean factors."""
    means = {k: mean_factor(updates, k) for k in state.tensors if k[-2:] in (".A", ".B")}
    product = change(state.spec, means, {})
    return {name: dense - product[name] for name, dense in mean_of(updates).items()}


@pytest.mark.parametrize("ranks", [(2, 2, 2), (1, 2, 2), (1, 1, 1)])
@pytest.mark.parametrize("method", ["lora", "rslora"])
def test_the_merge_is_exact_round_after_round(method, ranks):
    """W0 + folds + s B A = (W0 + old folds) + mean of s B_i A_i, in the state and as exported."""
    chosen, state, _ = make("fedex-lora", method)
    for number in range(4):
        updates = clients(chosen, state, ranks, seed=10 * number)
        before = base_change(state)
        ideal = {k: before[k] + v for k, v in mean_of(updates).items()}
        state = step(chosen, state, updates)
        assert far(whole(state), ideal) < 1e-6
        wide = chosen.global_delta(state)
        assert far(change(wide.spec, wide.tensors, {}), ideal) < 1e-6
    assert far(own(state), mean_of(updates)) > 1e-3


def test_the_factors_are_those_of_fedit():
    chosen, state, _ = make("fedex-lora")
    fedit, _, _ = make("fedit")
    updates = clients(chosen, state)
    new, plain = step(chosen, state, updates), step(fedit, state, updates)
    assert all(torch.equal(new.tensors[k], plain.tensors[k]) for k in plain.tensors)


@pytest.mark.parametrize(("count", "rank"), [(2, 1), (3, 1), (2, 2), (3, 2)])
def test_the_residual_has_rank_n_minus_one_times_r(count, rank):
    """Random clients reach it, up to min(d, k) = 5 and 4."""
    chosen, state, _ = make("fedex-lora", rank=rank)
    updates = clients(chosen, state)[:count]
    stacks = chosen.reduce(state, updates).stacks
    for layer in state.spec.layers:
        most = min((count - 1) * rank, layer.out, layer.inp)
        assert stacks[layer.name][1].shape[0] == most
        sigma = torch.linalg.svdvals(cross_term(updates, state)[layer.name])
        assert int((sigma > 1e-9 * sigma[0]).sum()) == most


def test_the_residual_is_the_cross_term_and_its_norm_is_in_the_record():
    chosen, state, _ = make("fedex-lora")
    updates = clients(chosen, state)
    stats = chosen.reduce(state, updates)
    dense = cross_term(updates, state)
    found = {name: left @ right for name, (left, right) in stats.stacks.items()}
    assert far(found, dense) < 1e-12
    norm = sum(float(e.norm() ** 2) for e in dense.values()) ** 0.5
    assert abs(stats.notes["residual_norm"] - norm) < 1e-10 * norm
    assert stats.notes["residual_rank"] == 4


@pytest.mark.parametrize("shared", ["both", "A", "B", "alone"])
def test_without_a_cross_term_nothing_is_folded(shared):
    """Equal clients, one client, or clients that differ in one factor only (FFA-LoRA)."""
    chosen, state, _ = make("fedex-lora")
    updates = clients(chosen, state)
    same = {
        k: v
        for k, v in updates[0].delta.tensors.items()
        if shared == "both" or k.endswith(f".{shared}")
    }
    updates = [
        replace(up, delta=replace(up.delta, tensors={**up.delta.tensors, **same})) for up in updates
    ]
    updates = updates[:1] if shared == "alone" else updates
    new = step(chosen, state, updates)
    assert not folds(new.tensors)
    assert far(own(new), mean_of(updates)) < 1e-6
    assert chosen.reduce(state, updates).notes == {"residual_norm": 0.0, "residual_rank": 0}


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_a_truncated_residual_is_the_best_of_its_rank(rank):
    """Error of the merge: sum of sigma_j^2 of the cross-term beyond the rank."""
    _, state, _ = make("fedex-lora")
    chosen = FedExLora(METHODS["lora"], {"residual_rank": rank})
    updates = clients(chosen, state)
    found = whole(step(chosen, state, updates))
    for name, ideal in mean_of(updates).items():
        sigma = torch.linalg.svdvals(cross_term(updates, state)[name])
        error = float((found[name] - ideal).norm() ** 2)
        assert abs(error - float((sigma[rank:] ** 2).sum())) < 1e-5 * float((sigma**2).sum())


@pytest.mark.parametrize("scale", [0.0, 0.25, 1.0])
def test_a_part_of_the_residual_may_be_folded(scale):
    _, state, _ = make("fedex-lora")
    chosen = FedExLora(METHODS["lora"], {"residual_scale": scale})
    updates = clients(chosen, state)
    new = step(chosen, state, updates)
    for name, dense in cross_term(updates, state).items():
        torch.testing.assert_close(base_change(new)[name], scale * dense, rtol=1e-5, atol=1e-6)
    assert bool(folds(new.tensors)) == (scale > 0)


def test_exact_only_with_all_of_the_residual():
    for options, exact in (
        ({}, True),
        ({"residual_scale": 1}, True),
        ({"residual_rank": 3}, False),
        ({"residual_scale": 0.5}, False),
    ):
        assert FedExLora(METHODS["lora"], options).exact == exact
    assert FedExLora.exact


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"residual_rank": -1}, r"residual_rank = -1; expected 0 \(all\) or more"),
        ({"residual_scale": 1.5}, r"residual_scale = 1.5; expected 0 to 1"),
        ({"residual_scale": float("nan")}, r"residual_scale = nan"),
    ],
)
def test_options_out_of_bounds_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        FedExLora(METHODS["lora"], options)


def test_products_in_place_of_the_factors_are_merged_exactly():
    """As from a wrapper that acts on the weight change: here every client's is halved."""
    chosen, state, _ = make("fedex-lora")
    updates = clients(chosen, state)
    half = [
        replace(
            up,
            products=lambda layer, up=up: tuple(
                0.5**0.5 * f for f in chosen.product(up, layer.name)
            ),
        )
        for up in updates
    ]
    ideal = {k: 0.5 * v for k, v in mean_of(updates).items()}
    assert far(whole(step(chosen, state, half)), ideal) < 1e-6


def test_an_absent_client_reaches_the_same_base_from_what_it_missed():
    """Also beyond the number of versions that are kept apart, where they are joined in one."""
    chosen, state, _ = make("fedex-lora", rank=1)
    ideal = base_change(state)
    for number in range(20):
        updates = clients(chosen, state, seed=10 * number, size=0.1)[:2]
        missed = {k: ideal[k] + v for k, v in cross_term(updates, state).items()}
        state, ideal = step(chosen, state, updates), missed
        start = chosen.broadcast(state, ClientInfo("late", 1))
        for layer in state.spec.layers:
            base = sum(
                (f[f"{layer.name}.L"].double() @ f[f"{layer.name}.Q"].double())
                for f in start.fold.values()
            )
            assert float((base - ideal[layer.name]).norm() / ideal[layer.name].norm()) < 1e-5
    assert 1 <= len(start.fold) < 20


def test_a_slot_that_nobody_held_can_learn_again():
    chosen, state, _ = make("fedex-lora", rank=4)
    updates = clients(chosen, from_start(state), (1, 1, 2))
    new = step(chosen, from_start(state), updates)
    for layer in state.spec.layers:
        b, a = (new.tensors[f"{layer.name}.{f}"] for f in "BA")
        assert bool(((b != 0).any(0) | (a != 0).any(1)).all())
    assert far(whole(new), mean_of(updates)) < 1e-6
