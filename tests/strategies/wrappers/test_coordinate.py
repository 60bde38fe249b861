"""Coordinate rules against numpy, element by element."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from fedlora.adapter import AdapterState
from fedlora.adapters import METHODS
from fedlora.errors import ConfigError, StrategyError
from fedlora.messages import LazyTensors
from fedlora.strategies import STRATEGIES
from fedlora.strategies.wrappers import WRAPPERS
from tests.server.cases import randn
from tests.strategies.rounds import cohort, make
from tests.strategies.wrappers.around import check, crowd, next_state, wrapped


def columns(updates, name):
    return np.stack([u.delta.tensors[name].double().numpy() for u in updates])


@pytest.mark.parametrize("n", [1, 2, 5, 8])
def test_the_median_is_numpys_of_every_element(n):
    chosen, state, _ = wrapped("coordinate-median")
    updates = crowd(chosen, state, n)
    new = next_state(chosen, state, updates)
    for name, old in state.tensors.items():
        middle = torch.from_numpy(np.median(columns(updates, name), axis=0))
        torch.testing.assert_close(new.tensors[name], (old.double() + middle).float())


@pytest.mark.parametrize(("n", "fraction", "cut"), [(5, 0.2, 1), (10, 0.29, 2), (4, 0.2, 0)])
def test_the_trimmed_mean_leaves_out_both_ends(n, fraction, cut):
    chosen, state, _ = wrapped("trimmed-mean", options={"fraction": fraction})
    updates = crowd(chosen, state, n)
    new = next_state(chosen, state, updates)
    for name, old in state.tensors.items():
        kept = np.sort(columns(updates, name), axis=0)[cut : n - cut]
        mean = torch.from_numpy(kept.mean(axis=0))
        torch.testing.assert_close(new.tensors[name], (old.double() + mean).float())


def test_a_fraction_that_rounds_down_in_binary_cuts_what_it_says():
    chosen, _, _ = wrapped("trimmed-mean", options={"fraction": 0.29})
    values = torch.arange(100.0).double()[:, None] ** 2
    torch.testing.assert_close(chosen.merge(values), values[29:71].mean(0))


def test_weights_do_not_count():
    chosen, state, _ = wrapped("coordinate-median")
    updates = crowd(chosen, state, 5)
    heavy = [replace(updates[0], weight=1e6), *updates[1:]]
    left, right = (next_state(chosen, state, u).tensors for u in (updates, heavy))
    assert all(torch.equal(left[k], right[k]) for k in left)


def test_tensors_are_read_one_at_a_time():
    """The inner strategy's sums ask for a tensor of all clients and then for the next one."""
    chosen, state, _ = wrapped("coordinate-median")
    asked = []

    def spy(up):
        held = up.delta.tensors
        lazy = LazyTensors(held, lambda name: asked.append(name) or held[name])
        return replace(up, delta=AdapterState(up.delta.spec, lazy))

    updates = [spy(u) for u in crowd(chosen, state, 4)]
    chosen.screen(state, updates)
    assert asked == []
    chosen.reduce(state, updates)
    names = list(dict.fromkeys(asked))
    assert asked == [name for name in names for _ in updates]


def test_the_median_of_factors_is_not_that_of_products():
    """For random B_i and one A, n = 5: far apart, so that the space must be named."""
    b = torch.stack([randn(32, 4, seed=i, dtype=torch.float64) for i in range(5)])
    a = randn(4, 24, seed=9, dtype=torch.float64)
    factors, products = b.median(0).values @ a, (b @ a).median(0).values
    assert float((factors - products).norm() / products.norm()) > 0.4


@pytest.mark.parametrize("fraction", [-0.1, 0.5])
def test_fractions_that_leave_nothing_are_refused(fraction):
    with pytest.raises(ConfigError, match=r"expected 0 <= fraction < 0\.5"):
        wrapped("trimmed-mean", options={"fraction": fraction})


def test_ranks_that_differ_after_all_are_refused():
    """A strategy may change clients' ranks from round to round, after all checks."""
    inner, state, _ = make("rolora")
    chosen = WRAPPERS["coordinate-median"](inner)
    with pytest.raises(StrategyError, match="client 'bob' sent other rank slots"):
        chosen.reduce(state, cohort(inner, state, ranks=(2, 1, 2, 2)))
    masked = [replace(u, slots=(1, 2)) for u in crowd(inner, state, 3)]
    with pytest.raises(StrategyError, match="sent other rank slots"):
        chosen.reduce(state, masked)


def test_control_variates_inside_are_refused():
    inner = WRAPPERS["scaffold"](STRATEGIES["fedit"](METHODS["lora"]))
    _, state, _ = make("fedit")
    with pytest.raises(ConfigError, match="scaffold inside it counts clients' control variates"):
        check(WRAPPERS["trimmed-mean"](inner), state, optimizer="sgd")
