"""Distances and norms of updates against dense float64 loops."""

from dataclasses import replace

import pytest
import torch

from fedlora.adapter import AdapterState
from fedlora.errors import StrategyError
from fedlora.linalg import stack
from fedlora.strategies.wrappers.distances import change, squared_distances, update_norm
from tests.strategies.rounds import cohort, make
from tests.strategies.wrappers.around import as_products, crowd, dense, moved, squared

INNER = [("fedit", 0), ("ffa-lora", 0), ("rolora", 0), ("rolora", 1)]
SPACES = ("factor", "product")


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize(("strategy", "number"), INNER)
def test_distances_and_norms_are_those_of_the_dense_updates(strategy, number, space):
    chosen, state, basis = make(strategy, "lora", number)
    updates = crowd(chosen, state, 5)
    points = [dense(u, basis, space) for u in updates]
    found = squared_distances(chosen.traits, state, updates, space)
    torch.testing.assert_close(found, squared(points), rtol=1e-12, atol=1e-12)
    for u, point in zip(updates, points, strict=True):
        norm = update_norm(chosen.traits, u, space)
        assert norm == pytest.approx(float(point.norm()), rel=1e-12)


@pytest.mark.parametrize("strategy", ["ffa-lora", "rolora"])
def test_products_of_unequal_ranks_are_compared_each_from_its_own_start(strategy):
    chosen, state, basis = make(strategy, "lora", rank=3)
    updates = cohort(chosen, state, ranks=(3, 1, 2, 3))
    found = squared_distances(chosen.traits, state, updates, "product")
    points = [as_products(u, basis) for u in updates]
    torch.testing.assert_close(found, squared(points), rtol=1e-12, atol=1e-12)


def test_a_small_step_from_large_factors_keeps_its_digits():
    """From B = 1e8, a step of 1e-8 in B alone: s |dB A|, which dense B A would lose."""
    chosen, state, _ = make("fedit", "lora")
    (up,) = crowd(chosen, state, 1)
    name = "p.B"
    start = AdapterState(state.spec, {**up.start.tensors, name: up.start.tensors[name] * 1e8})
    step = {k: torch.zeros_like(t) for k, t in up.delta.tensors.items()}
    step[name] = up.delta.tensors[name] * 1e-8
    small = replace(moved(up, step), start=start)
    expected = state.spec.layer("p").scale * step[name] @ up.start.tensors["p.A"].double()
    found = update_norm(chosen.traits, small, "product")
    assert found == pytest.approx(float(expected.norm()), rel=1e-12)


def test_equal_updates_have_distance_zero_to_the_last_bit():
    chosen, state, _ = make("fedit", "lora")
    one = crowd(chosen, state, 1)[0]
    for space in SPACES:
        found = squared_distances(chosen.traits, state, [one] * 4, space)
        assert torch.equal(found, torch.zeros(4, 4, dtype=torch.float64))


def test_attached_products_take_the_place_of_the_factors():
    chosen, state, _ = make("fedit", "lora")
    one, two = crowd(chosen, state, 2)
    stranger = replace(
        one,
        products=lambda layer: stack(
            [chosen.product(two, layer.name), chosen.product(two, layer.name)], [0.25, 0.75]
        ),
    )
    for layer in state.spec.layers:
        left, right = change(chosen.traits, stranger, layer.name)
        other = change(chosen.traits, two, layer.name)
        torch.testing.assert_close(left @ right, other[0] @ other[1], rtol=1e-12, atol=1e-12)


def test_clients_that_send_different_tensors_are_not_compared():
    chosen, state, _ = make("fedit", "lora")
    one, two = crowd(chosen, state, 2)
    less = moved(two, {k: v for k, v in two.delta.tensors.items() if k != "q.A"})
    with pytest.raises(StrategyError, match=r"'c00' and 'c01' sent different tensors \(q.A in"):
        squared_distances(chosen.traits, state, [one, less], "factor")
