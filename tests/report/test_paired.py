"""Spread and paired differences, against numpy and scipy."""

import math

import numpy
import pytest
from scipy import stats

from fedlora.report.paired import paired, spread


def test_spread_is_mean_and_sample_deviation():
    values = [0.31, 0.35, 0.28, 0.4]
    found = spread(values)
    assert found.mean == pytest.approx(numpy.mean(values), rel=1e-15)
    assert found.deviation == pytest.approx(numpy.std(values, ddof=1), rel=1e-12)
    assert found.count == 4


def test_few_values_have_no_deviation():
    assert (spread([]).mean, spread([]).deviation, spread([]).count) == (None, None, 0)
    assert (spread([2.0]).mean, spread([2.0]).deviation) == (2.0, None)


@pytest.mark.parametrize("count", [2, 3, 10])
def test_the_interval_is_that_of_scipy_on_the_differences(count):
    draws = numpy.random.default_rng(count)
    mine, other = draws.normal(1.0, 0.3, count), draws.normal(0.9, 0.3, count)
    # in another order and with seeds that only one has: pairs are made by key
    found = paired(
        {**dict(enumerate(mine.tolist())), 98: 7.0},
        {99: -7.0, **dict(reversed(list(enumerate(other.tolist()))))},
    )
    test = stats.ttest_rel(mine, other)
    interval = test.confidence_interval(0.95)
    assert found is not None
    assert found.count == count
    assert found.mean == pytest.approx(float((mine - other).mean()), rel=1e-12)
    assert found.error == pytest.approx(float(stats.sem(mine - other)), rel=1e-12)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high), rel=1e-9)
    assert found.clear == (test.pvalue < 0.05)


def test_three_differences_by_hand():
    """1, 2, 3: s = 1, t(0.975, 2) = 4.302653 from Student's table."""
    found = paired({0: 1.0, 1: 2.0, 2: 3.0}, {0: 0.0, 1: 0.0, 2: 0.0})
    assert found is not None
    assert found.error == pytest.approx(1 / math.sqrt(3))
    assert found.low == pytest.approx(2 - 4.302653 / math.sqrt(3), abs=1e-6)
    assert found.high == pytest.approx(2 + 4.302653 / math.sqrt(3), abs=1e-6)
    assert not found.clear


def test_one_pair_has_a_difference_but_no_interval():
    found = paired({3: 0.5, 4: 1.0}, {3: 0.2})
    assert found is not None
    assert found.mean == pytest.approx(0.3)
    assert (found.error, found.low, found.high, found.count) == (None, None, None, 1)
    assert not found.clear
    assert paired({1: 0.5}, {2: 0.5}) is None
