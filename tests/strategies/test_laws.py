"""What must hold for every strategy with every method it takes, in float64."""

import contextlib
from dataclasses import replace

import pytest
import torch

from fedlora.adapter import AdapterState
from fedlora.adapters import METHODS
from fedlora.checkpoint import Committed
from fedlora.errors import AdapterError, ConfigError
from fedlora.server.rounds import resume_state
from fedlora.strategies import STRATEGIES
from fedlora.strategies.base import ClientInfo
from tests.server.cases import make_spec, random_state, with_basis
from tests.strategies.rounds import (
    NAMES,
    PAIRS,
    change,
    check,
    cohort,
    distance,
    ended_with,
    expected,
    make,
    mean_change,
    merged,
    update,
)

pytestmark = pytest.mark.parametrize("number", [0, 1], ids=["odd", "even"])
each = pytest.mark.parametrize(("strategy", "method"), PAIRS)


@each
def test_equal_updates_give_that_update(strategy, method, number):
    chosen, state, _ = make(strategy, method, number)
    same = [
        replace(update(chosen, state, name, 5), weight=w)
        for name, w in zip(NAMES, (1, 2, 3, 9), strict=True)
    ]
    assert distance(merged(chosen, state, same), ended_with(same[0])) < 1e-14


@each
def test_one_client_alone_is_taken_as_it_is(strategy, method, number):
    chosen, state, _ = make(strategy, method, number)
    one = update(chosen, state, "ann", 1, weight=17.0)
    assert distance(merged(chosen, state, [one]), ended_with(one)) < 1e-14


@each
def test_the_mean_is_that_of_the_trained_tensors(strategy, method, number):
    """A dense float64 loop over clients; frozen tensors stay as they are."""
    chosen, state, _ = make(strategy, method, number)
    updates = cohort(chosen, state)
    found = merged(chosen, state, updates)
    total = sum(up.weight for up in updates)
    for name, old in state.tensors.items():
        if name in updates[0].delta.tensors:
            average = sum(
                (up.weight / total) * (old.double() + up.delta.tensors[name]) for up in updates
            )
            torch.testing.assert_close(found[name], average, rtol=1e-13, atol=1e-13)
        else:
            assert torch.equal(found[name], old.double())


@each
def test_which_client_holds_which_update_changes_nothing(strategy, method, number):
    chosen, state, _ = make(strategy, method, number)
    updates = cohort(chosen, state)
    turned = [replace(up, client=name) for up, name in zip(updates, reversed(NAMES), strict=True)]
    turned.sort(key=lambda up: up.client)
    assert distance(merged(chosen, state, turned), merged(chosen, state, updates)) < 1e-10


@each
def test_only_the_ratio_of_weights_counts(strategy, method, number):
    chosen, state, _ = make(strategy, method, number)
    updates = cohort(chosen, state)
    found = merged(chosen, state, updates)
    for factor, tolerance in ((4.0, 0.0), (0.3, 1e-14), (1e6, 1e-14)):
        scaled = [replace(up, weight=up.weight * factor) for up in updates]
        assert distance(merged(chosen, state, scaled), found) <= tolerance


@each
def test_a_client_of_weight_zero_changes_no_bit(strategy, method, number):
    chosen, state, _ = make(strategy, method, number)
    updates = cohort(chosen, state)
    stranger = update(chosen, state, "bea", 50, weight=0.0)
    more = sorted([*updates, stranger], key=lambda up: up.client)
    assert distance(merged(chosen, state, more), merged(chosen, state, updates)) == 0.0


@each
def test_a_client_may_be_split_in_two_halves(strategy, method, number):
    chosen, state, _ = make(strategy, method, number)
    updates = cohort(chosen, state)
    half = replace(updates[2], weight=updates[2].weight / 2)
    split = [*updates[:2], half, replace(half, client="cyd-2"), updates[3]]
    assert distance(merged(chosen, state, split), merged(chosen, state, updates)) < 1e-14


@each
def test_exact_strategies_average_the_weight_change_itself(strategy, method, number):
    """Oracle: the dense mean of the clients' weight changes."""
    chosen, state, basis = make(strategy, method, number)
    updates = cohort(chosen, state)
    found = change(state.spec, merged(chosen, state, updates), basis)
    gap = distance(found, mean_change(updates, basis))
    if chosen.exact or METHODS[method].affine:
        assert gap < 1e-13
    else:
        assert gap > 1e-3


@each
def test_only_planned_tensors_and_heads_are_sent(strategy, method, number):
    chosen, state, _ = make(strategy, method, number)
    sent = expected(chosen, state, ClientInfo("ann", 2))
    planned = {f"{layer.name}.{f}" for layer in state.spec.layers for f in chosen.factors(state)}
    assert sent.keys() == planned | {"head.weight", "head.bias"}
    if strategy != "fedit":
        assert len(chosen.factors(state)) == 1


@each
def test_no_function_changes_its_inputs(strategy, method, number):
    chosen, state, _ = make(strategy, method, number)
    updates = cohort(chosen, state)
    seen = [
        state.tensors,
        *(up.delta.tensors for up in updates),
        *(up.start.tensors for up in updates),
    ]
    before = [{k: v.clone() for k, v in tensors.items()} for tensors in seen]
    stats = chosen.reduce(state, updates)
    sums = {k: v.clone() for k, v in stats.sums.items()}
    new = chosen.refactor(state, stats)
    chosen.refactor(new, chosen.reduce(new, cohort(chosen, new)))
    chosen.broadcast(new, ClientInfo("ann", 2))
    chosen.global_delta(new)
    for tensors, copies in zip([*seen, stats.sums], [*before, sums], strict=True):
        assert tensors.keys() == copies.keys()
        assert all(torch.equal(tensors[k], copies[k]) for k in copies)


@each
def test_updates_may_be_read_twice(strategy, method, number):
    chosen, state, _ = make(strategy, method, number)
    updates = cohort(chosen, state)
    once, twice = (chosen.reduce(state, updates) for _ in range(2))
    assert all(torch.equal(once.sums[k], twice.sums[k]) for k in once.sums)


@each
def test_the_next_state_is_complete_and_in_float32(strategy, method, number):
    chosen, state, _ = make(strategy, method, number)
    updates = cohort(chosen, state)
    new = chosen.refactor(state, chosen.reduce(state, updates))
    assert new.round == number + 1
    assert new.spec == state.spec
    assert new.tensors.keys() == state.tensors.keys()
    for name, tensor in new.tensors.items():
        assert (tensor.dtype, tensor.shape) == (torch.float32, state.tensors[name].shape)
    assert distance(new.tensors, merged(chosen, state, updates)) < 1e-6
    for name in state.tensors.keys() - updates[0].delta.tensors.keys():
        assert torch.equal(new.tensors[name], state.tensors[name])


@each
def test_a_state_read_from_disk_goes_on_alike(strategy, method, number):
    chosen, state, _ = make(strategy, method, number)
    record = {"run": "x", "extra": dict(state.extra)}
    again = resume_state(
        Committed(number, state.tensors, record), chosen.init(random_state(state.spec, 9))
    )
    assert chosen.factors(again) == chosen.factors(state)
    left, right = (merged(chosen, s, cohort(chosen, s)) for s in (state, again))
    assert all(torch.equal(left[k], right[k]) for k in left)


@each
def test_every_client_of_one_rank_starts_from_the_global_adapter(strategy, method, number):
    chosen, state, _ = make(strategy, method, number)
    keys = {chosen.broadcast_key(state, ClientInfo(name, 2)) for name in NAMES}
    assert len(keys) == 1
    start = chosen.broadcast(state, ClientInfo("ann", 2)).adapter
    assert start.spec == state.spec
    assert all(torch.equal(start.tensors[k], state.tensors[k]) for k in state.tensors)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_options_that_no_one_knows_are_refused(strategy, number):
    with pytest.raises(ConfigError, match=r"strategy_options\.momentun is not known to strategy"):
        STRATEGIES[strategy](METHODS["lora"], {"momentun": number})


@pytest.mark.parametrize("strategy", ["ffa-lora", "rolora"])
@pytest.mark.parametrize("method", ["lora-xs", "miss", "bone-col", "bone-row", "dora"])
def test_strategies_that_freeze_a_factor_need_a_pair_of_them(strategy, method, number):
    spec = make_spec(method)
    with pytest.raises(ConfigError, match="choose strategy fedit, or method lora") as caught:
        check(STRATEGIES[strategy](METHODS[method]), spec, [2] * (number + 1))
    assert ("averaged exactly" in str(caught.value)) == METHODS[method].affine


@each
def test_equal_ranks_are_always_fine(strategy, method, number):
    chosen, state, _ = make(strategy, method, number)
    check(chosen, state.spec, [2, 2, 2])


@pytest.mark.parametrize("method", ["lora", "pissa", "vera", "lora-xs", "dora", "miss"])
def test_fedit_refuses_unequal_ranks_and_names_what_takes_them(method, number):
    """Everything named takes the method and the ranks; nothing that does is left out."""
    spec, _ = with_basis(make_spec(method))
    ranks = [2, 1, 2, 1]
    with pytest.raises(ConfigError, match=r"ranks \[1, 2\]; give all clients rank 2") as caught:
        check(STRATEGIES["fedit"](METHODS[method]), spec, ranks)
    taken = set()
    for name, strategy in STRATEGIES.items():
        with contextlib.suppress(ConfigError, AdapterError):
            check(strategy(METHODS[method]), spec, ranks)
            taken.add(name)
    _, _, advice = str(caught.value).partition("choose strategy ")
    assert set(advice.split(" or ")) - {""} == taken
    assert {"lora": "ffa-lora" in taken, "lora-xs": taken == {"fed-sb"}}.get(method, True)


@pytest.mark.parametrize("given", [{"privacy": "client"}, {"asynchronous": True}])
@pytest.mark.parametrize("method", ["lora", "lora-xs", "dora"])
def test_what_is_advised_fits_the_method_too(method, given, number):
    spec, _ = with_basis(make_spec(method))
    for strategy in STRATEGIES.values():
        if strategy.misfit(METHODS[method]):
            continue
        try:
            check(strategy(METHODS[method]), spec, [2], **given)
        except ConfigError as e:
            for name in str(e).partition("choose strategy ")[2].split(" or "):
                check(STRATEGIES[name](METHODS[method]), spec, [2], **given)


@pytest.mark.parametrize("strategy", ["ffa-lora", "rolora"])
def test_ranks_without_an_exact_embedding_are_refused_before_round_1(strategy, number):
    spec, _ = with_basis(make_spec("pissa"))
    with pytest.raises(AdapterError, match="cannot change rank from 2 to 1 exactly"):
        check(STRATEGIES[strategy](METHODS["pissa"]), spec, [2, 1])


def test_adapter_states_add_and_scale_tensor_by_tensor(number):
    spec = make_spec()
    left, right = random_state(spec, 1), random_state(spec, 2)
    found = (left + right.scaled(-2.0)) - left
    for name, tensor in right.tensors.items():
        torch.testing.assert_close(found.tensors[name], -2.0 * tensor)
    with pytest.raises(AdapterError, match="expected equal shapes"):
        left + AdapterState(spec, {k: v[:1] for k, v in right.tensors.items()})
    with pytest.raises(AdapterError, match="in only one"):
        left - AdapterState(spec, {})
