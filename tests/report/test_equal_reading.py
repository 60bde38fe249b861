"""Curves read at an equal round and at equal bytes."""

from hypothesis import given
from hypothesis import strategies as st

from fedlora.report.equal_reading import (
    SLACK,
    Evaluated,
    at_bytes,
    at_round,
    common_bytes,
    common_round,
)


def curve(*points):
    return [Evaluated(number, size, value) for number, size, value in points]


CHEAP = curve((2, 200, 0.1), (4, 400, 0.2), (6, 600, 0.3))
DEAR = curve((1, 350, 0.4), (2, 700, 0.5), (3, 1050, 0.6))


def test_the_budget_is_what_the_cheapest_has_spent_at_its_end():
    budget = common_bytes([CHEAP, DEAR])
    assert budget == 600
    assert at_bytes(CHEAP, budget) == CHEAP[-1]
    assert at_bytes(DEAR, budget) == DEAR[0]


def test_a_budget_met_exactly_counts():
    assert at_bytes(DEAR, 700) == DEAR[1]
    assert at_bytes(DEAR, 699) == DEAR[0]


def test_nothing_is_read_before_the_first_evaluation():
    assert at_bytes(DEAR, 349) is None
    assert at_round(CHEAP, 1) is None


def test_a_few_bytes_of_text_do_not_cost_a_round():
    wordy = curve((1, 1003, 0.1), (2, 2006, 0.2))
    terse = curve((1, 1000, 0.1), (2, 2000, 0.3))
    budget = common_bytes([wordy, terse])
    assert [at_bytes(c, budget).round for c in (wordy, terse)] == [2, 2]
    beyond = curve((1, 1000, 0.1), (2, int(2000 * (1 + 2 * SLACK)), 0.2))
    budget = common_bytes([beyond, terse])
    assert [at_bytes(c, budget).round for c in (beyond, terse)] == [1, 2]


def test_the_common_round_is_where_the_shortest_ends():
    assert common_round([CHEAP, DEAR]) == 3
    assert at_round(CHEAP, 3) == CHEAP[0]
    assert at_round(DEAR, 3) == DEAR[-1]


def test_a_diverged_round_is_read_as_it_is():
    lost = curve((1, 100, 0.5), (2, 200, None))
    assert at_bytes(lost, 200).value is None
    assert at_round(lost, 5).value is None


def test_without_curves_there_is_no_budget():
    assert common_round([]) is None
    assert common_bytes([[]]) is None


CURVES = st.lists(
    st.lists(st.tuples(st.integers(1, 3), st.integers(1, 9999)), min_size=1, max_size=9),
    min_size=1,
    max_size=4,
)


@given(CURVES)
def test_no_reading_is_beyond_the_budget_or_before_a_later_one_within_it(steps):
    """The slow way: try every point of every curve."""
    curves = []
    for increments in steps:
        rounds = size = 0
        points = []
        for add_rounds, add_bytes in increments:
            rounds, size = rounds + add_rounds, size + add_bytes
            points.append((rounds, size, 0.0))
        curves.append(curve(*points))
    budget = common_bytes(curves)
    least = min(c[-1].num_bytes for c in curves)
    assert least <= budget <= least * (1 + SLACK)
    for c in curves:
        within = [p for p in c if p.num_bytes <= budget]
        assert at_bytes(c, budget) == (max(within, key=lambda p: p.round) if within else None)
