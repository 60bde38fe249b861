"""Weiszfeld by weights against Weiszfeld on points, and what a median must be."""

from dataclasses import replace

import pytest
import torch

from fedlora.strategies.wrappers.geometric_median import weiszfeld
from tests.strategies.quadratic import gauss
from tests.strategies.wrappers.around import crowd, dense, squared, wrapped


def slow(points, weights, steps=3000):
    """The point itself, by gradient-free iteration in the space of the points."""
    at = (weights[:, None] * points).sum(0)
    for _ in range(steps):
        pull = weights / (points - at).norm(dim=1).clamp(min=1e-12)
        at = (pull[:, None] * points).sum(0) / pull.sum()
    return at


@pytest.mark.parametrize("n", [3, 6, 11])
def test_weights_lead_to_the_point_that_iteration_on_points_finds(n):
    points = gauss(n, 5, seed=n)
    weights = gauss(n, seed=n + 1).abs() + 0.1
    weights /= weights.sum()
    found = weiszfeld(squared(points), weights)
    assert float(found.sum()) == pytest.approx(1.0)
    median = found @ points
    # where the median is one of the points, smoothing leaves a millionth of the others
    torch.testing.assert_close(median, slow(points, weights), rtol=1e-5, atol=1e-5)


def test_the_gradient_vanishes_at_the_median():
    points = gauss(9, 8, seed=1)
    weights = torch.full((9,), 1 / 9, dtype=torch.float64)
    found = weiszfeld(squared(points), weights)
    assert float(found.max()) < 0.5
    gaps = points - found @ points
    gradient = (weights[:, None] * gaps / gaps.norm(dim=1, keepdim=True)).sum(0)
    assert float(gradient.norm()) < 1e-12


def test_of_three_points_on_a_line_the_middle_one():
    line = torch.tensor([-1.0, 0.25, 7.0]).double()[:, None] * gauss(1, 6, seed=2)
    found = weiszfeld(squared(line), torch.full((3,), 1 / 3, dtype=torch.float64))
    torch.testing.assert_close(found, torch.tensor([0.0, 1.0, 0.0]).double(), atol=1e-5, rtol=0)


def test_a_point_of_more_than_half_the_weight_is_the_median():
    points = gauss(4, 3, seed=3)
    weights = torch.tensor([0.1, 0.6, 0.2, 0.1]).double()
    found = weiszfeld(squared(points), weights)
    assert float(found[1]) > 1 - 1e-5


@pytest.mark.parametrize("space", ["product", "factor"])
def test_updates_get_the_weights_of_their_dense_median(space):
    chosen, state, basis = wrapped("geometric-median", options={"space": space})
    updates = crowd(chosen, state, 6)
    points = torch.stack([dense(u, basis, space) for u in updates])
    weights = torch.tensor([u.weight for u in updates], dtype=torch.float64)
    passed, notes = chosen.screen(state, updates)
    found = torch.tensor([u.weight for u in passed], dtype=torch.float64)
    assert float(found.sum()) == pytest.approx(float(weights.sum()))
    median = slow(points, weights / weights.sum())
    torch.testing.assert_close(found / found.sum() @ points, median, rtol=1e-6, atol=1e-6)
    assert sum(notes["weights"].values()) == pytest.approx(1.0, abs=1e-5)
    assert [u.delta for u in passed] == [u.delta for u in updates]


@pytest.mark.parametrize("strategy", ["ffa-lora", "products"])
def test_an_exact_strategy_merges_the_geometric_median_of_the_weight_changes(strategy):
    chosen, state, basis = wrapped("geometric-median", strategy)
    updates = crowd(chosen, state, 6)
    passed, _ = chosen.screen(state, updates)
    stacks = chosen.inner.stacks(state, passed)
    points = torch.stack([dense(u, basis, "product") for u in updates])
    weights = torch.tensor([u.weight for u in updates], dtype=torch.float64)
    median = slow(points, weights / weights.sum())
    found = []
    for layer in state.spec.layers:
        left, right = stacks[layer.name]
        b, a = (state.tensors[f"{layer.name}.{f}"].double() for f in "BA")
        found.append((left @ right - layer.scale * b @ a).flatten())
    found = torch.cat(found)
    torch.testing.assert_close(found, median[: len(found)], rtol=1e-6, atol=1e-6)


def test_a_client_of_weight_zero_changes_nothing():
    chosen, state, _ = wrapped("geometric-median")
    updates = crowd(chosen, state, 5)
    stranger = replace(crowd(chosen, state, 6)[-1], weight=0.0)
    less, _ = chosen.screen(state, updates)
    more, _ = chosen.screen(state, [*updates, stranger])
    assert more[-1].weight == 0.0
    for one, other in zip(less, more, strict=False):
        assert one.weight == pytest.approx(other.weight, rel=1e-6)
