"""The reported error of a merge, against dense matrices."""

import math

import pytest
import torch

import fedlora.server.aggregation_error as module
from fedlora.adapter import AdapterState, split_name
from fedlora.adapters import METHODS
from fedlora.linalg import product_norm, stack
from fedlora.server.aggregation_error import Trained, aggregation_error
from tests.server.cases import randn
from tests.strategies.rounds import change, cohort, ended_with, make, mean_change

LOWRANK = ("lora", "rslora", "pissa", "lora-xs", "vera", "miss")


def trained(updates):
    total = sum(up.weight for up in updates)

    def reader(tensors):
        return lambda layer: {
            split_name(k)[1]: v for k, v in tensors.items() if split_name(k)[0] == layer.name
        }

    return [Trained(up.weight / total, up.delta.spec, reader(ended_with(up))) for up in updates]


def no_fold(layer):
    return None


def measured(chosen, state, basis, updates):
    """(reported error, dense error) of the state after a round."""
    new = chosen.refactor(state, chosen.reduce(state, updates))
    method = METHODS[state.spec.method]
    found = aggregation_error(method, basis, trained(updates), chosen.global_delta(new), no_fold)
    exact = mean_change(updates, basis)
    merged = change(state.spec, {k: v.double() for k, v in new.tensors.items()}, basis)
    gap = math.sqrt(sum(float((exact[k] - merged[k]).norm() ** 2) for k in exact))
    return found, gap / math.sqrt(sum(float(exact[k].norm() ** 2) for k in exact))


@pytest.fixture(params=["stacked", "row blocks", "single rows"])
def budget(request, monkeypatch):
    """Both ways to compute it; the small budgets do not hold the stacked factors."""
    small = {"row blocks": 2 * 7, "single rows": 1}
    if request.param in small:
        monkeypatch.setattr(module, "BUDGET_ELEMENTS", small[request.param])


@pytest.mark.usefixtures("budget")
@pytest.mark.parametrize("method", LOWRANK)
def test_the_error_of_factor_averaging_equals_the_dense_one(method):
    found, dense = measured(*(parts := make("fedit", method)), cohort(*parts[:2]))
    if METHODS[method].affine:
        assert found < 1e-5
        assert dense < 1e-5
    else:
        assert found > 1e-3
        assert found == pytest.approx(dense, rel=1e-6)


@pytest.mark.usefixtures("budget")
@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("method", ["lora", "rslora", "pissa", "vera"])
@pytest.mark.parametrize("strategy", ["ffa-lora", "rolora"])
def test_exact_strategies_have_none(strategy, method, number):
    """Nothing but the rounding of the next state to float32 is left."""
    parts = make(strategy, method, number)
    found, dense = measured(*parts, cohort(*parts[:2]))
    assert found < 1e-5
    assert dense < 1e-5


@pytest.mark.usefixtures("budget")
@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("strategy", ["ffa-lora", "rolora"])
def test_clients_of_unequal_rank_count_with_their_own_factors(strategy, number):
    parts = make(strategy, "lora", number, rank=4)
    found, dense = measured(*parts, cohort(*parts[:2], ranks=(4, 1, 2, 3)))
    assert found < 1e-5
    assert dense < 1e-5


@pytest.mark.parametrize("method", ["bone-col", "bone-row"])
def test_bone_is_measured_in_its_factors(method):
    """The change is linear in them, so that one error is zero exactly when the other is."""
    chosen, state, basis = make("fedit", method)
    updates = cohort(chosen, state)
    assert measured(chosen, state, basis, updates)[0] < 1e-6
    clients = trained(updates)
    mean = {
        k: sum(up.weight * ended_with(up)[k] for up in updates) / sum(up.weight for up in updates)
        for k in state.tensors
    }
    off = {k: 1.25 * v for k, v in mean.items()}
    found = aggregation_error(
        METHODS[method], basis, clients, AdapterState(state.spec, off), no_fold
    )
    assert found == pytest.approx(0.25)


def test_dora_has_none_to_report():
    """Its change is not affine in its factors and needs W0."""
    chosen, state, basis = make("fedit", "dora")
    assert measured(chosen, state, basis, cohort(chosen, state))[0] is None


def test_nothing_trained_is_no_error():
    chosen, state, basis = make("ffa-lora", "lora")
    updates = cohort(chosen, state)
    zero = {k: torch.zeros_like(v) for k, v in state.tensors.items()}
    clients = [
        Trained(
            0.25,
            up.delta.spec,
            lambda layer: {"A": zero[f"{layer.name}.A"], "B": zero[f"{layer.name}.B"]},
        )
        for up in updates
    ]
    method = METHODS["lora"]
    assert aggregation_error(method, basis, clients, AdapterState(state.spec, zero), no_fold) == 0.0
    ones = {k: torch.ones_like(v) for k, v in zero.items()}
    assert (
        aggregation_error(method, basis, clients, AdapterState(state.spec, ones), no_fold)
        == math.inf
    )


def test_measuring_changes_no_input():
    chosen, state, basis = make("fedit", "vera")
    updates = cohort(chosen, state)
    held = [t for up in updates for t in (up.start.tensors, up.delta.tensors)] + [basis]
    before = [{k: v.clone() for k, v in tensors.items()} for tensors in held]
    measured(chosen, state, basis, updates)
    for tensors, copy in zip(held, before, strict=True):
        assert all(torch.equal(tensors[k], copy[k]) for k in copy)


@pytest.mark.parametrize("shape", [(9, 2, 7), (3, 8, 7), (9, 8, 2), (1, 1, 1), (4, 9, 4)])
def test_product_norm_is_the_dense_frobenius_norm(shape):
    d, rank, k = shape
    left, right = randn(d, rank, seed=1), randn(rank, k, seed=2)
    expected = float((left.double() @ right.double()).norm())
    assert product_norm(left, right) == pytest.approx(expected, rel=1e-12)


def test_a_product_that_cancels_comes_out_as_nothing():
    """A Gram matrix would leave half the digits, 1e-8."""
    b, a = randn(9, 3, seed=1), randn(3, 7, seed=2)
    left, right = stack([(b, a), (b, a), (b, a)], [0.5, 0.5, -1.0])
    assert product_norm(left, right) < 1e-14 * product_norm(b, a) * 10


def test_stack_equals_the_dense_sum():
    pairs = [(randn(5, r, seed=r), randn(r, 4, seed=10 + r)) for r in (1, 2, 3)]
    weights = [0.2, 0.3, 0.5]
    left, right = stack(pairs, weights)
    expected = sum(w * b.double() @ a.double() for w, (b, a) in zip(weights, pairs, strict=True))
    torch.testing.assert_close(left @ right, expected, rtol=1e-12, atol=1e-12)
