"""Epsilon against closed forms, the defining sum and Google's accountant."""

import itertools
import math
import subprocess
import sys

import pytest
from dp_accounting.pld import privacy_loss_distribution
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq
from scipy.special import logsumexp
from scipy.stats import norm

from fedlora.errors import BudgetExhausted, ConfigError
from fedlora.privacy.accounting import (
    ORDERS,
    Event,
    _divergence,
    check_delta,
    default_delta,
    epsilon,
    merged,
    noise_for,
)

DELTA = 1e-5
# q, sigma, steps: a client's batches, a few clients of many, everybody
GRID = list(itertools.product((0.001, 0.01, 0.05, 0.3, 1.0), (0.8, 1.0, 1.5, 2.5, 5.0), (1, 40)))

EVENTS = st.builds(
    Event,
    st.sampled_from((1e-4, 0.01, 0.1, 0.25, 0.3, 0.6, 0.99, 1.0)),
    st.sampled_from((0.3, 0.7, 1.0, 2.0, 8.0, 100.0)),
    st.integers(0, 10_000),
)


def pld(rate, noise, steps, delta=DELTA):
    """Epsilon by Google's privacy loss distributions, rounded up."""
    one = privacy_loss_distribution.from_gaussian_mechanism(
        noise, sampling_prob=rate, value_discretization_interval=1e-3
    )
    return one.self_compose(steps).get_epsilon_for_delta(delta)


def gaussian(noise, steps, delta=DELTA):
    """Epsilon of steps without sampling: Balle and Wang 2018, arXiv 1805.06530, theorem 8."""
    mu = math.sqrt(steps) / noise

    def excess(eps):
        return norm.cdf(mu / 2 - eps / mu) - math.exp(eps) * norm.cdf(-mu / 2 - eps / mu) - delta

    return brentq(excess, 0.0, 100.0)


def renyi(rate, noise, steps, delta=DELTA, orders=range(2, 64)):
    """Epsilon by the sum of Mironov et al. 2019, section 3.3, at whole orders."""

    def at(order):
        terms = [
            math.log(math.comb(order, k))
            + (order - k) * math.log1p(-rate)
            + k * math.log(rate)
            + (k * k - k) / (2 * noise**2)
            for k in range(order + 1)
        ]
        spent = steps * logsumexp(terms) / (order - 1)
        return spent + math.log1p(-1 / order) - (math.log(delta) + math.log(order)) / (order - 1)

    return min(map(at, orders))


@pytest.mark.parametrize(
    ("noise", "steps", "exact"), [(1.0, 10, 17.857), (2.0, 50, 20.676), (5.0, 200, 15.456)]
)
def test_without_sampling_both_lie_just_above_the_closed_form(noise, steps, exact):
    assert gaussian(noise, steps) == pytest.approx(exact, abs=1e-3)
    events = [Event(1.0, noise, steps)]
    assert exact <= epsilon(events, DELTA, "prv") <= exact + 0.012
    assert exact <= epsilon(events, DELTA) <= exact * 1.075


@pytest.mark.parametrize(
    ("case", "truth"),
    [((0.02, 1.0, 1000), 3.899), ((0.1, 2.0, 300), 4.183), ((0.05, 1.2, 500), 5.398)],
)
def test_with_sampling_both_lie_just_above_the_loss_distribution(case, truth):
    assert pld(*case) == pytest.approx(truth, abs=2e-3)
    assert epsilon([Event(*case)], DELTA, "prv") == pytest.approx(truth + 0.01, abs=2e-3)
    assert truth <= epsilon([Event(*case)], DELTA) <= truth * 1.11


def test_on_a_grid_prv_is_the_truth_and_rdp_never_below_it():
    for case in GRID:
        truth, prv = pld(*case), epsilon([Event(*case)], DELTA, "prv")
        assert -0.001 <= prv - truth <= 0.02, case
        assert epsilon([Event(*case)], DELTA) >= truth, case


@pytest.mark.parametrize("case", [(0.016, 1.0, 500), (0.2, 3.0, 300), (0.001, 0.7, 2000)])
def test_rdp_is_the_defining_sum_and_finer_orders_only_tighten_it(case):
    plain, ours = renyi(*case), epsilon([Event(*case)], DELTA)
    assert plain * 0.94 <= ours <= plain * (1 + 1e-9)


@pytest.mark.parametrize("rate", [0.249, 0.26, 0.5, 0.999])
def test_rdp_above_the_rates_of_the_series_is_sound_and_near(rate):
    truth = pld(rate, 3.0, 100)
    assert truth <= epsilon([Event(rate, 3.0, 100)], DELTA) <= truth * 1.12


@given(EVENTS, st.sampled_from(("rate", "noise", "steps")))
@settings(max_examples=80, deadline=None)
def test_more_steps_a_higher_rate_or_less_noise_never_spend_less(event, what):
    worse = {
        "rate": Event(min(1.0, event.rate * 1.3), event.noise, event.steps),
        "noise": Event(event.rate, event.noise / 1.3, event.steps),
        "steps": Event(event.rate, event.noise, event.steps + 1),
    }[what]
    assert epsilon([worse], DELTA) >= epsilon([event], DELTA) * (1 - 1e-9)


@given(st.lists(EVENTS, max_size=5), st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None)
def test_neither_order_nor_splitting_matters(events, chance):
    pieces = []
    for event in events:
        cut = chance.randint(0, event.steps)
        pieces += [Event(event.rate, event.noise, cut, "metric")]
        pieces += [Event(event.rate, event.noise, event.steps - cut)]
    chance.shuffle(pieces)
    assert merged(pieces) == merged(events)
    assert epsilon(pieces, DELTA) == epsilon(events, DELTA)


@given(st.lists(EVENTS, min_size=1, max_size=4), EVENTS)
@settings(max_examples=40, deadline=None)
def test_one_more_event_never_spends_less_and_a_smaller_delta_more(events, extra):
    assert epsilon([*events, extra], DELTA) >= epsilon(events, DELTA)
    assert epsilon(events, DELTA / 10) >= epsilon(events, DELTA)


@given(st.lists(EVENTS, min_size=1, max_size=3), st.sampled_from((1e-3, 1e-5, 1e-9)))
@settings(max_examples=40, deadline=None)
def test_the_best_order_is_found_among_all(events, delta):
    together = merged(events)

    def at(order):
        spent = math.fsum(e.steps * _divergence(e.rate, e.noise, order) for e in together)
        return spent + math.log1p(-1 / order) - (math.log(delta) + math.log(order)) / (order - 1)

    if together:
        assert epsilon(events, delta) == max(0.0, min(map(at, ORDERS)))


def test_nothing_spends_nothing():
    for accountant in ("rdp", "prv"):
        assert epsilon([], DELTA, accountant) == 0.0
        assert epsilon([Event(0.1, 1.0, 0)], DELTA, accountant) == 0.0


@given(
    st.sampled_from((0.5, 1.0, 3.0, 8.0)),
    st.sampled_from((0.001, 0.02, 0.2, 1.0)),
    st.sampled_from((1, 50, 2000)),
    st.sampled_from(((), (Event(0.02, 5.0, 100),))),
)
@settings(max_examples=8, deadline=None)
def test_the_noise_is_the_smallest_that_fits(budget, rate, steps, spent):
    noise = noise_for(budget, DELTA, rate, steps, spent)
    digits, exponent = f"{noise:.3e}".split("e")
    assert float(f"{noise:.3e}") == noise
    assert epsilon([*spent, Event(rate, noise, steps)], DELTA) <= budget
    less = float(f"{float(digits) - 0.001:.3f}e{exponent}")
    assert noise == 0.01 or epsilon([*spent, Event(rate, less, steps)], DELTA) > budget


@pytest.mark.parametrize(
    ("records", "batch", "steps", "expected"),
    [(2000, 32, 500, 1.58), (10_000, 64, 1000, 1.06), (500, 16, 250, 2.11)],
)
def test_the_noise_for_epsilon_1_is_about_the_one_that_exact_accounting_finds(
    records, batch, steps, expected
):
    """RDP asks for up to a tenth more than the exact figures."""
    assert expected <= noise_for(1.0, DELTA, batch / records, steps) <= expected * 1.12


def test_no_noise_fits_once_the_budget_is_spent():
    spent = [Event(1.0, 1.0, 10)]
    with pytest.raises(BudgetExhausted, match=r"epsilon 19 at delta 1e-05: 19\.05 is spent") as e:
        noise_for(19.0, DELTA, 0.01, 1, spent)
    assert e.value.exit_code == 4


@pytest.mark.parametrize("rate", [0.0, -0.1, 1.0001, math.nan, math.inf])
def test_a_rate_that_is_none_is_refused(rate):
    with pytest.raises(ConfigError, match="sampling rate"):
        Event(rate, 1.0, 1)


@pytest.mark.parametrize("noise", [0.0, -1.0, math.nan, math.inf])
def test_noise_that_is_none_is_refused(noise):
    with pytest.raises(ConfigError, match="noise multiplier"):
        Event(0.1, noise, 1)


@pytest.mark.parametrize("steps", [-1, 1.5, math.nan, True])
def test_a_number_of_steps_that_is_none_is_refused(steps):
    with pytest.raises(ConfigError, match="number of steps"):
        Event(0.1, 1.0, steps)


@pytest.mark.parametrize("delta", [0.0, 1.0, -1e-5, math.nan])
def test_a_delta_that_is_none_is_refused(delta):
    with pytest.raises(ConfigError, match="delta"):
        epsilon([Event(0.1, 1.0, 1)], delta)
    with pytest.raises(ConfigError, match="delta"):
        check_delta(delta, 10)


def test_delta_is_below_the_chance_to_pick_one_unit():
    check_delta(0.99e-3, 1000)
    with pytest.raises(ConfigError, match=r"1 / 1000 = 0\.001"):
        check_delta(1e-3, 1000)
    assert default_delta(100) == default_delta(10_000) == 1e-5
    assert default_delta(10**9) == 1e-10
    assert default_delta(20_000) == 5e-6


def test_the_central_limit_accountant_is_not_offered():
    with pytest.raises(ConfigError, match="known: rdp, prv"):
        epsilon([Event(0.1, 1.0, 1)], DELTA, "gdp")


def test_orders_rise_and_importing_does_not_import_torch():
    assert list(ORDERS) == sorted(set(ORDERS))
    code = "import sys, fedlora.privacy.accounting; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
