"""Fed-SB against the dense product with explicit basis matrices."""

import pytest
import torch

from fedlora.adapters import METHODS
from fedlora.errors import ConfigError
from fedlora.strategies.base import ClientInfo
from tests.server.cases import make_spec
from tests.strategies.rounds import (
    change,
    check,
    cohort,
    distance,
    expected,
    make,
    mean_change,
    merged,
)


@pytest.mark.parametrize("ranks", [(4, 4, 4, 4), (4, 1, 2, 3), (1, 1, 2, 1)])
def test_the_mean_of_r_is_the_mean_of_the_changes(ranks):
    """B mean(R) A = sum_i p_i B_i R_i A_i, with B_i, A_i the leading part each client holds."""
    chosen, state, basis = make("fed-sb", "lora-xs", rank=4)
    check(chosen, state.spec, ranks)
    updates = cohort(chosen, state, ranks)
    found = change(state.spec, merged(chosen, state, updates), basis)
    assert distance(found, mean_change(updates, basis)) < 1e-13


def test_what_is_sent_does_not_depend_on_the_size_of_the_layers():
    chosen, state, _ = make("fed-sb", "lora-xs", rank=3, heads=False)
    shapes = expected(chosen, state, ClientInfo("ann", 3))
    assert set(shapes.values()) == {(3, 3)}


def test_only_r_is_ever_in_the_state():
    """B and A belong to the frozen basis, which no round can change."""
    chosen, state, _ = make("fed-sb", "lora-xs")
    new = chosen.refactor(state, chosen.reduce(state, cohort(chosen, state)))
    assert {name for name in new.tensors if "head" not in name} == {"p.R", "q.R"}


@pytest.mark.parametrize("method", [name for name in METHODS if name != "lora-xs"])
def test_other_methods_are_refused_with_what_fits_them(method):
    with pytest.raises(ConfigError, match=r"choose method lora-xs, or strategy") as caught:
        check(make("fed-sb", method)[0], make_spec(method), [2])
    other = str(caught.value).rpartition(" ")[2]
    check(make(other, method)[0], make_spec(method), [2])


@pytest.mark.parametrize("unit", ["record", "client"])
def test_averaging_r_keeps_both_guarantees_and_takes_late_updates(unit):
    chosen, state, _ = make("fed-sb", "lora-xs")
    check(chosen, state.spec, [2], privacy=unit, asynchronous=True)


def test_the_energy_of_noise_on_r_is_r_squared_times_that_of_one_entry():
    """E |s B N A|^2 = s^2 sigma^2 |B|^2 |A|^2 for N (r, r) iid: r^2 when both are orthonormal."""
    draws = torch.Generator().manual_seed(0)
    rank, sigma = 3, 0.1
    b = torch.linalg.qr(torch.randn(12, rank, generator=draws, dtype=torch.float64)).Q
    a = torch.linalg.qr(torch.randn(9, rank, generator=draws, dtype=torch.float64)).Q.T
    noise = sigma * torch.randn(20_000, rank, rank, generator=draws, dtype=torch.float64)
    energy = (b @ noise @ a).square().sum((1, 2)).mean()
    assert float(energy) == pytest.approx(sigma**2 * rank**2, rel=0.02)
