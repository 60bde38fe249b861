"""Plans: what they say of noise is what accounting says."""

import math

import pytest
from scipy.stats import binom

from fedlora.errors import BudgetExhausted, ConfigError
from fedlora.privacy.accounting import Event, epsilon
from fedlora.privacy.plan import Schedule, make_plan, noise_norm
from fedlora.report.plan_figure import plan_figure
from fedlora.report.theme import to_png

RECORDS = Schedule("record", 2000, 32.0, rounds=25, steps=20, delta=1e-5)


@pytest.fixture(scope="module")
def plan():
    return make_plan(RECORDS, [1.0, 6.0], points=3)


def test_the_noise_spends_the_budget_and_no_more(plan):
    for row in plan.rows:
        event = Event(32 / 2000, row.noise, 500)
        assert row.budget * 0.995 <= row.rdp <= row.budget
        assert row.rdp == epsilon([event], 1e-5)
        assert row.prv == epsilon([event], 1e-5, "prv") <= row.rdp
        assert row.per_coordinate == row.noise / 32


def test_larger_batches_and_budgets_need_less_noise_on_the_mean(plan):
    assert plan.batches == [16.0, 32.0, 64.0, 128.0]
    for row in plan.rows:
        sizes = plan.trade_off[row.budget]
        assert sizes == sorted(sizes, reverse=True)
        assert sizes[1] == row.per_coordinate
    assert plan.rows[1].per_coordinate < plan.rows[0].per_coordinate


def test_on_the_way_the_budget_fills_up_to_the_last_round(plan):
    for row in plan.rows:
        rounds, rdp, prv = zip(*plan.spent[row.budget], strict=True)
        assert rounds == (8, 17, 25)
        assert list(rdp) == sorted(rdp)
        assert list(prv) == sorted(prv)
        assert (rdp[-1], prv[-1]) == (row.rdp, row.prv)


def test_figures_are_paid_for_out_of_the_same_budget():
    costly = Schedule("record", 2000, 32.0, 25, 20, 1e-5, figures=(Event(1.0, 30.0, 25),))
    assert costly.noise(3.0) > RECORDS.noise(3.0)
    with pytest.raises(BudgetExhausted):
        costly.noise(0.1)


@pytest.mark.parametrize(("units", "batch"), [(2000, 4.0), (100, 8.0), (10, 10.0)])
def test_empty_steps_are_as_likely_as_no_success_in_n_draws(units, batch):
    schedule = Schedule("record", units, batch, 1, 1, 1e-6)
    assert schedule.empty == pytest.approx(binom.pmf(0, units, batch / units), rel=1e-9)


def test_a_fixed_number_of_clients_amplifies_nothing():
    clients = Schedule("client", 1000, 50.0, 100, 1, 1e-5, amplified=False)
    assert (clients.rate, clients.empty) == (1.0, 0.0)
    assert clients.events(1.0) == [Event(1.0, 1.0, 100)]


def test_the_noise_of_an_update_grows_with_the_root_of_its_size(plan):
    row = plan.rows[0]
    assert noise_norm(row, 10_000) == pytest.approx(100 * row.per_coordinate)
    assert noise_norm(row, 4) / noise_norm(row, 1) == pytest.approx(math.sqrt(4))


def test_a_delta_that_gives_a_unit_away_is_refused():
    with pytest.raises(ConfigError, match="1 / 100"):
        Schedule("client", 100, 10.0, 1, 1, 0.01)


def test_it_is_drawn(plan):
    figure = plan_figure(plan)
    left, right = figure.axes
    drawn = {tuple(line.get_ydata()) for line in left.lines}
    assert drawn >= {tuple(sizes) for sizes in plan.trade_off.values()}
    drawn = {tuple(line.get_ydata()) for line in right.lines}
    assert drawn >= {tuple(rdp for _, rdp, _ in way) for way in plan.spent.values()}
    assert to_png(figure).startswith(b"\x89PNG")
