"""What every robust rule must do, and what they refuse."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.errors import ConfigError
from fedlora.strategies.wrappers import WRAPPERS
from tests.strategies.rounds import make, update
from tests.strategies.wrappers.around import (
    PRODUCT,
    ROBUST,
    as_factors,
    check,
    crowd,
    next_state,
    scaled,
    step_of,
    wrapped,
)

N = 13
CASES = [
    *((name, {}) for name in ("coordinate-median", "trimmed-mean")),
    *((name, {"space": space}) for name in PRODUCT for space in ("product", "factor")),
]
# the rules that bound what one client can do; LoDD's default only writes down
BOUNDED = [(name, {**o, "action": "drop"} if name == "lodd" else o) for name, o in CASES]
rules = pytest.mark.parametrize(("wrapper", "options"), CASES)


@rules
@pytest.mark.parametrize("strategy", ["fedit", "ffa-lora", "rolora"])
def test_equal_updates_give_that_update(wrapper, options, strategy):
    chosen, state, _ = wrapped(wrapper, strategy, options=options)
    same = [update(chosen, state, f"c{i:02d}", 5, weight=1.0 + i) for i in range(N)]
    new = next_state(chosen, state, same)
    for name, value in same[0].trained.items():
        torch.testing.assert_close(new.tensors[name], value.float(), rtol=1e-7, atol=0)


@pytest.mark.parametrize(("wrapper", "options"), [*BOUNDED, ("norm-cap", {})])
@pytest.mark.parametrize("place", [0, 7, N - 1])
def test_one_client_a_million_times_too_large_moves_little(wrapper, options, place):
    """Within three times the largest honest update; a plain mean is far outside."""
    chosen, state, _ = wrapped(wrapper, options=options)
    updates = crowd(chosen, state, N, weights=[1.0] * N)
    updates[place] = scaled(updates[place], 1e6)
    honest = [float(as_factors(u).norm()) for i, u in enumerate(updates) if i != place]
    moved = float(step_of(state, next_state(chosen, state, updates)).norm())
    assert moved <= 3 * max(honest)
    plain = next_state(chosen.inner, state, updates)
    assert float(step_of(state, plain).norm()) > 1e3 * max(honest)


@settings(max_examples=15)
@given(st.sampled_from(CASES), st.permutations(range(N)))
def test_which_client_holds_which_update_changes_nothing(case, order):
    wrapper, options = case
    chosen, state, _ = wrapped(wrapper, options=options)
    updates = crowd(chosen, state, N)
    names = [u.client for u in updates]
    turned = [
        update(chosen, state, names[place], seed=old, weight=updates[old].weight)
        for place, old in enumerate(order)
    ]
    left, right = (step_of(state, next_state(chosen, state, u)) for u in (updates, turned))
    torch.testing.assert_close(left, right, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("wrapper", ROBUST)
def test_guarantees_for_clients_and_stale_updates_are_refused(wrapper):
    chosen, state, _ = wrapped(wrapper)
    check(chosen, state)
    check(chosen, state, privacy="record")
    with pytest.raises(ConfigError, match=f"\"client\" is voided by wrapper '{wrapper}'.*record"):
        check(chosen, state, privacy="client")
    with pytest.raises(ConfigError, match=f"\"async\" does not fit wrapper '{wrapper}'"):
        check(chosen, state, asynchronous=True)
    assert not chosen.linear
    assert chosen.exact is False


@rules
def test_factors_of_unequal_rank_are_refused_and_products_are_not(wrapper, options):
    chosen, state, _ = wrapped(wrapper, "rolora", options=options)
    ranks = [2, 1] * 6
    if options.get("space") == "product":
        check(chosen, state, ranks=ranks)
        return
    with pytest.raises(ConfigError, match=rf"wrapper '{wrapper}' needs equal ranks.*\[1, 2\]"):
        check(chosen, state, ranks=ranks)


@pytest.mark.parametrize("wrapper", PRODUCT)
def test_products_are_refused_where_there_are_none(wrapper):
    chosen, state, _ = wrapped(wrapper, "fedit", "dora")
    with pytest.raises(ConfigError, match="which method 'dora' is not; choose space = \"factor\""):
        check(chosen, state)
    chosen, state, _ = wrapped(wrapper, "fedit", "dora", options={"space": "factor"})
    check(chosen, state)
    with pytest.raises(ConfigError, match='space = "cosine" is not known; choose "factor" or'):
        wrapped(wrapper, options={"space": "cosine"})


@pytest.mark.parametrize("wrapper", PRODUCT)
def test_products_are_refused_where_a_factor_stays_at_the_clients(wrapper):
    inner, state, _ = make("fedit")
    inner.personal = True
    with pytest.raises(ConfigError, match="a part of the adapter stays at the client"):
        check(WRAPPERS[wrapper](inner), state)


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_options_that_no_one_knows_are_refused(wrapper):
    with pytest.raises(ConfigError, match=f"federation.wrappers.{wrapper}.hostil is not known"):
        wrapped(wrapper, options={"hostil": 2})


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_what_the_strategy_inside_refuses_is_refused(wrapper):
    chosen, state, _ = wrapped(wrapper)
    with pytest.raises(ConfigError, match="strategy 'fedit' needs equal ranks"):
        check(chosen, state, ranks=[2, 1] * 6, optimizer="sgd")


@pytest.mark.parametrize("wrapper", ["coordinate-median", "trimmed-mean", "scaffold"])
def test_slots_that_clients_choose_themselves_are_refused(wrapper):
    inner, state, _ = make("lora-a2")
    with pytest.raises(ConfigError, match="with strategy 'lora-a2' clients choose"):
        check(WRAPPERS[wrapper](inner), state, optimizer="sgd")
