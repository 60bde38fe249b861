"""Krum against a loop over pairs."""

import pytest
import torch

from fedlora.errors import ConfigError, StrategyError
from fedlora.strategies.wrappers.krum import krum_scores
from tests.strategies.wrappers.around import (
    check,
    crowd,
    dense,
    next_state,
    scaled,
    squared,
    wrapped,
)


def slow_scores(points, f):
    """Sum of the squared distances to the n - f - 2 nearest others, one pair at a time."""
    n = len(points)
    scores = []
    for i in range(n):
        others = sorted(float(((points[i] - points[j]) ** 2).sum()) for j in range(n) if j != i)
        scores.append(sum(others[: n - f - 2]))
    return scores


@pytest.mark.parametrize("space", ["product", "factor"])
@pytest.mark.parametrize(("n", "f"), [(3, 0), (7, 2), (10, 3), (11, 1)])
def test_scores_and_choice_are_those_of_the_dense_updates(n, f, space):
    options = {"hostile": f, "space": space}
    chosen, state, basis = wrapped("multi-krum", options=options)
    updates = [scaled(u, 1 + i / 5) for i, u in enumerate(crowd(chosen, state, n))]
    points = [dense(u, basis, space) for u in updates]
    expected = slow_scores(points, f)
    found = krum_scores(squared(points), f)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))
    best = sorted(range(n), key=expected.__getitem__)
    passed, notes = chosen.screen(state, updates)
    kept = sorted(best[: n - chosen.hostile(n)])
    assert passed == [updates[i] for i in kept]
    assert notes["left_out"] == [u.client for i, u in enumerate(updates) if i not in kept]
    krum, _, _ = wrapped("krum", options=options)
    passed, _ = krum.screen(state, updates)
    assert len(passed) == 1
    assert passed[0] is updates[best[0]]


@pytest.mark.parametrize("strategy", ["fedit", "ffa-lora", "rolora"])
def test_krum_returns_one_of_its_inputs_bit_by_bit(strategy):
    chosen, state, _ = wrapped("krum", strategy)
    updates = crowd(chosen, state, 9, weights=[0.1 + 0.7 * i for i in range(9)])
    new = next_state(chosen, state, updates)
    inputs = [{k: v.float() for k, v in u.trained.items()} for u in updates]
    assert sum(all(torch.equal(new.tensors[k], v) for k, v in one.items()) for one in inputs) == 1


def test_hostile_clients_far_from_the_others_are_left_out():
    chosen, state, _ = wrapped("multi-krum", options={"hostile": 3})
    updates = crowd(chosen, state, 10, size=0.1)
    for i in (1, 4, 8):
        updates[i] = scaled(updates[i], -20.0)
    _, notes = chosen.screen(state, updates)
    assert notes == {"left_out": ["c01", "c04", "c08"]}


@pytest.mark.parametrize("wrapper", ["krum", "multi-krum"])
def test_too_few_updates_for_so_many_hostile_ones(wrapper):
    chosen, state, _ = wrapped(wrapper, options={"hostile": 2})
    check(chosen, state, n=7)
    with pytest.raises(ConfigError, match=r"rounds of 6 clients: 2 hostile .* 2 \* 2 \+ 2 = 6"):
        check(chosen, state, n=6)
    with pytest.raises(StrategyError, match=r"round of 6 updates: 2 hostile .* to at most 1"):
        chosen.reduce(state, crowd(chosen, state, 6))
    chosen, state, _ = wrapped(wrapper)
    with pytest.raises(ConfigError, match=r"in a round; take more clients"):
        check(chosen, state, n=2)
    with pytest.raises(ConfigError, match="hostile = -1; expected a number of clients"):
        wrapped(wrapper, options={"hostile": -1})


def test_by_default_at_most_three_tenths_are_taken_for_hostile():
    chosen, _, _ = wrapped("multi-krum")
    found = {n: chosen.hostile(n) for n in (3, 4, 5, 7, 10, 20, 100)}
    assert found == {3: 0, 4: 0, 5: 1, 7: 2, 10: 3, 20: 6, 100: 30}
    assert all(n > 2 * f + 2 for n, f in found.items())


def test_keep_is_at_most_what_is_left_of_the_hostile_ones():
    for keep, kept in ((0, 7), (1, 1), (4, 4), (9, 7)):
        chosen, state, _ = wrapped("multi-krum", options={"hostile": 3, "keep": keep})
        passed, _ = chosen.screen(state, crowd(chosen, state, 10))
        assert len(passed) == kept
