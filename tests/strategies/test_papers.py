"""What each paper claims of its own strategy, and clients of unequal rank."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.adapter import with_rank
from fedlora.adapters import METHODS
from fedlora.errors import ConfigError
from fedlora.server.admission import expected_size
from fedlora.strategies.base import ClientInfo
from fedlora.wire import header
from tests.server.cases import make_spec, random_state
from tests.strategies.rounds import (
    NAMES,
    WEIGHTS,
    change,
    check,
    cohort,
    distance,
    ended_with,
    expected,
    factor_names,
    make,
    mean_change,
    merged,
    update,
)


@pytest.mark.parametrize("method", ["lora", "rslora", "pissa"])
def test_fedit_is_off_by_the_covariance_of_the_factors(method):
    """T - s B A = s sum_i p_i (B_i - B)(A_i - A) with B, A the means; Zhang et al. 2305.05644."""
    chosen, state, basis = make("fedit", method)
    updates = cohort(chosen, state)
    mean = merged(chosen, state, updates)
    exact, found = mean_change(updates, basis), change(state.spec, mean, basis)
    total = sum(WEIGHTS)
    for layer in state.spec.layers:
        a, b = f"{layer.name}.A", f"{layer.name}.B"
        ended = [ended_with(up) for up in updates]
        covariance = layer.scale * sum(
            (w / total) * (e[b] - mean[b]) @ (e[a] - mean[a])
            for w, e in zip(WEIGHTS, ended, strict=True)
        )
        torch.testing.assert_close(
            exact[layer.name] - found[layer.name], covariance, rtol=1e-12, atol=1e-12
        )
        assert covariance.norm() > 1e-2 * exact[layer.name].norm()


@pytest.mark.parametrize("frozen", ["A", "B"])
def test_fedit_is_exact_when_one_factor_is_equal_at_all_clients(frozen):
    chosen, state, basis = make("fedit")
    updates = cohort(chosen, state)
    shared = {k: updates[0].delta.tensors[k] for k in factor_names(state.spec, frozen)}
    updates = [
        replace(up, delta=replace(up.delta, tensors={**up.delta.tensors, **shared}))
        for up in updates
    ]
    found = change(state.spec, merged(chosen, state, updates), basis)
    assert distance(found, mean_change(updates, basis)) < 1e-13


def test_ffa_averages_the_products_by_averaging_one_factor():
    """mean_i(B_i) A = mean_i(B_i A); Sun et al. 2403.12313, section 4."""
    chosen, state, _ = make("ffa-lora")
    updates = cohort(chosen, state)
    mean = merged(chosen, state, updates)
    for layer in state.spec.layers:
        a, b = f"{layer.name}.A", f"{layer.name}.B"
        assert torch.equal(mean[a], state.tensors[a].double())
        products = sum(
            w * up.trained[b] @ state.tensors[a].double()
            for w, up in zip(WEIGHTS, updates, strict=True)
        )
        torch.testing.assert_close(mean[b] @ mean[a], products / sum(WEIGHTS), rtol=1e-12, atol=0)


def test_ffa_never_asks_for_the_frozen_factor_and_never_changes_it():
    chosen, state, _ = make("ffa-lora")
    first = state
    for _ in range(4):
        assert not [k for k in expected(chosen, state, ClientInfo("ann", 2)) if k.endswith(".A")]
        updates = cohort(chosen, state)
        state = chosen.refactor(state, chosen.reduce(state, updates))
        for name in factor_names(state.spec, "A"):
            assert torch.equal(state.tensors[name], first.tensors[name])


@pytest.mark.parametrize("strategy", ["ffa-lora", "rolora"])
def test_one_factor_costs_d_of_d_plus_k(strategy):
    """Uplink of the zero-initialised factor alone, against both; half only for d = k."""
    chosen, state, _ = make(strategy, heads=False)
    fedit, whole, _ = make("fedit", heads=False)
    info = ClientInfo("ann", 2)
    data = [
        expected_size(shapes) - len(header(shapes))
        for shapes in (expected(chosen, state, info), expected(fedit, whole, info))
    ]
    d = sum(layer.out for layer in state.spec.layers)
    k = sum(layer.inp for layer in state.spec.layers)
    assert data[0] * (d + k) == data[1] * d
    assert data[1] == 4 * 2 * (d + k)


def test_rolora_takes_turns_and_starts_with_the_factor_that_is_zero():
    """Chen et al. 2502.01755, section 3: with B = 0 the factor A has no gradient."""
    chosen, state, _ = make("rolora")
    turns = []
    for number in range(6):
        turns.append(chosen.factors(state))
        updates = cohort(chosen, state)
        new = chosen.refactor(state, chosen.reduce(state, updates))
        frozen = "A" if turns[-1] == ("B",) else "B"
        for name in factor_names(state.spec, frozen):
            assert torch.equal(new.tensors[name], state.tensors[name])
        for name in factor_names(state.spec, *turns[-1]):
            assert not torch.equal(new.tensors[name], state.tensors[name])
        # the same turn from a state that was only counted up to here
        assert chosen.factors(make("rolora", number=number + 1)[1]) == chosen.factors(new)
        state = new
    assert turns == [("B",), ("A",)] * 3


MIXED = ((4, 1, 2, 3), (1, 1, 2, 2), (1, 1, 1, 1), (4, 4, 4, 4))


@pytest.mark.parametrize("ranks", MIXED)
@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("method", ["lora", "rslora"])
@pytest.mark.parametrize("strategy", ["ffa-lora", "rolora"])
def test_unequal_ranks_average_to_the_exact_mean(strategy, method, number, ranks):
    """T = sum_i p_i s B_i A_i from the clients' own small factors, without any padding."""
    chosen, state, basis = make(strategy, method, number, rank=4)
    check(chosen, state.spec, ranks)
    updates = cohort(chosen, state, ranks)
    found = change(state.spec, merged(chosen, state, updates), basis)
    assert distance(found, mean_change(updates, basis)) < 1e-13


@pytest.mark.parametrize("strategy", ["ffa-lora", "rolora"])
def test_unequal_ranks_are_refused_where_padding_is_not_exact(strategy):
    """VeRA's b has no slots: with another v at each client, mean(b_i) is not what they did."""
    chosen, state, basis = make(strategy, "vera", rank=4)
    updates = cohort(chosen, state, (4, 1, 2, 3))
    found = change(state.spec, merged(chosen, state, updates), basis)
    assert distance(found, mean_change(updates, basis)) > 1e-3
    with pytest.raises(ConfigError, match=r"factor b of method 'vera' is not made of slots"):
        check(chosen, state.spec, [4, 1, 2, 3])


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_a_small_client_holds_the_leading_slots_at_the_scale_of_the_whole(rank):
    chosen, state, basis = make("ffa-lora", rank=4)
    start = chosen.broadcast(state, ClientInfo("ann", rank)).adapter
    assert start.spec == with_rank(state.spec, rank)
    assert {layer.scale for layer in start.spec.layers} == {2.0}
    for layer in state.spec.layers:
        a, b = f"{layer.name}.A", f"{layer.name}.B"
        assert torch.equal(start.tensors[a], state.tensors[a][:rank])
        assert torch.equal(start.tensors[b], state.tensors[b][:, :rank])
    assert expected(chosen, state, ClientInfo("ann", rank))["p.B"] == (6, rank)
    whole, part = (change(s.spec, s.tensors, basis) for s in (state, start))
    for layer in state.spec.layers:
        a, b = state.tensors[f"{layer.name}.A"], state.tensors[f"{layer.name}.B"]
        rest = 2.0 * b[:, rank:].double() @ a[rank:].double()
        torch.testing.assert_close(whole[layer.name] - rest, part[layer.name])


@settings(max_examples=40)
@given(
    st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=3), min_size=1, max_size=6),
    st.integers(0, 100),
)
def test_no_slot_of_rolora_dies(present, seed):
    """Whoever takes part in a round, every slot keeps a non-zero column of B or row of A, for
    with both zero neither would ever have a gradient again; and every round stays exact.
    """
    chosen, state, _ = make("rolora", rank=4, heads=False)
    state = chosen.init(random_state(make_spec(rank=4, heads=False), seed))
    tensors = {k: v * 0 if k.endswith(".B") else v for k, v in state.tensors.items()}
    state = replace(state, tensors=tensors)
    for ranks in present:
        updates = [
            update(chosen, state, name, seed + i, 1.0 + i, rank)
            for i, (name, rank) in enumerate(zip(NAMES, ranks, strict=False))
        ]
        exact = mean_change(updates, {})
        state = chosen.refactor(state, chosen.reduce(state, updates))
        for layer in state.spec.layers:
            b, a = state.tensors[f"{layer.name}.B"], state.tensors[f"{layer.name}.A"]
            assert bool(((b != 0).any(0) | (a != 0).any(1)).all())
        found = change(state.spec, state.tensors, {})
        assert all((found[k] - exact[k]).abs().max() < 1e-5 for k in exact)


def test_a_slot_that_nobody_held_has_a_gradient_again():
    """Gradient of |s B A - M|^2 / 2 after two rounds of clients that hold one slot of four."""
    chosen, state, _ = make("rolora", rank=4, heads=False)
    for ranks in ((4, 4), (1, 1), (1, 1)):
        updates = [
            update(chosen, state, name, i, 1.0, rank)
            for i, (name, rank) in enumerate(zip(NAMES, ranks, strict=False))
        ]
        state = chosen.refactor(state, chosen.reduce(state, updates))
    b, a = (state.tensors[f"p.{f}"].double() for f in "BA")
    gap = 2.0 * b @ a - torch.ones(6, 5, dtype=torch.float64)
    slots = (gap @ a.T).abs().amax(0) + (b.T @ gap).abs().amax(1)
    assert bool((slots > 0).all())


def test_methods_with_a_pair_are_those_that_are_linear_in_each_of_two_factors():
    found = {name for name, method in METHODS.items() if method.bilinear_factors}
    assert found == {"lora", "rslora", "pissa", "vera"}
