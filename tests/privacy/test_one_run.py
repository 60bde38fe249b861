"""The one-run audit refutes faulty mechanisms and never the sound one."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedlora.privacy.audit.one_run import audit, lower_bound, refuting
from tests.privacy.mutants_of_chance import NoiseOverBatchTwice, NoNoise
from tests.privacy.mutants_of_sums import ClipOfTheBatch

torch.set_num_threads(1)
FAULTS = (NoNoise, NoiseOverBatchTwice, ClipOfTheBatch)
SEEDS = [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 8))]


@pytest.mark.parametrize("seed", SEEDS)
def test_the_sound_mechanism_is_not_refuted(seed):
    found = audit(seed)
    assert found.claimed == pytest.approx(0.81, abs=0.01)
    assert not found.falsified


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_gross_fault_is_refuted(fault, seed):
    found = audit(seed, fault)
    assert found.falsified
    assert found.bound > 2.0


def binomial_tail(guesses, least, chance):
    """P[W >= least], summed term by term."""
    return sum(
        math.comb(guesses, k) * chance**k * (1 - chance) ** (guesses - k)
        for k in range(least, guesses + 1)
    )


@given(
    guesses=st.integers(1, 30), data=st.data(), epsilon=st.floats(0.0, 3.0), m=st.integers(30, 90)
)
def test_the_tail_is_that_of_the_theorem(guesses, data, epsilon, m):
    right = data.draw(st.integers(1, guesses))
    chance = math.exp(epsilon) / (1 + math.exp(epsilon))
    tails = [binomial_tail(guesses, right - i, chance) for i in range(right + 1)]
    steepest = max((tails[i] - tails[0]) / i for i in range(1, right + 1))
    expected = min(1.0, tails[0] + 2 * m * 1e-3 * steepest)
    assert refuting(m, guesses, right, epsilon, 1e-3) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("right", [110, 130, 150, 190])
def test_a_claim_below_the_bound_would_be_refuted_and_one_above_not(right):
    bound = lower_bound(800, 200, right, 0.01)
    assert bound > 0.0 or right == 110
    if bound:
        assert refuting(800, 200, right, 0.99 * bound, 1e-5) < 0.01
        assert refuting(800, 200, right, 1.01 * bound, 1e-5) > 0.01


def test_coin_flips_refute_nothing():
    assert lower_bound(800, 400, 200, 0.01) == 0.0
