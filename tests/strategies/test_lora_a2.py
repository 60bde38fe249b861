"""LoRA-A2 against a loop over slots and their owners."""

from dataclasses import replace

import pytest
import torch

from fedlora.adapter import AdapterState
from fedlora.adapters import METHODS
from fedlora.adapters.slots import indices, pack, unpack
from fedlora.errors import ConfigError
from fedlora.messages import RoundPlan
from fedlora.strategies.base import ClientInfo
from fedlora.strategies.lora_a2 import LoraA2
from fedlora.strategies.rolora import RoLora
from tests.server.cases import make_spec, random_state
from tests.strategies.rounds import change, check, cohort, distance, mean_change, merged

MASKS = ((0b0011, 0b0100), (0b1000, 0b0000), (0b0110, 0b0101), (0b0001, 0b0111))


def make(number=0, rank=4, **options):
    chosen = LoraA2(METHODS["lora"], options)
    state = chosen.init(random_state(make_spec(rank=rank), 3))
    return chosen, replace(state, round=number)


def planned(chosen, state, rank):
    blank = RoundPlan("run", state.round + 1, 0, "ann", (), rank, 1)
    return chosen.plan(state, ClientInfo("ann", rank), blank)


def masked(chosen, state):
    """Four clients that moved only the slots of their masks, as they arrive."""
    updates = []
    for up, masks in zip(cohort(chosen, state), MASKS, strict=True):
        spec, factors = up.delta.spec, chosen.factors(state)
        delta = {k: v.float() for k, v in up.delta.tensors.items()}
        tensors = unpack(pack(delta, spec, factors, masks), spec, factors, masks)
        updates.append(replace(up, delta=AdapterState(spec, tensors), slots=masks))
    return updates


@pytest.mark.parametrize("number", [0, 1])
def test_a_slot_moves_by_what_its_owners_changed(number):
    """Slot += sum over its owners of p_i delta_i, p_i over all clients of the round."""
    chosen, state = make(number)
    updates = masked(chosen, state)
    new = chosen.refactor(state, chosen.reduce(state, updates))
    total = sum(up.weight for up in updates)
    (factor,) = chosen.factors(state)
    for index, layer in enumerate(state.spec.layers):
        name = f"{layer.name}.{factor}"
        for slot in range(4):
            pick = (slice(None), slot) if factor == "B" else slot
            moved = state.tensors[name][pick].double()
            for up, masks in zip(updates, MASKS, strict=True):
                if slot in indices(masks[index], 4):
                    moved = moved + up.weight / total * up.delta.tensors[name][pick].double()
            torch.testing.assert_close(new.tensors[name][pick].double(), moved)
        other = f"{layer.name}.{'A' if factor == 'B' else 'B'}"
        assert torch.equal(new.tensors[other], state.tensors[other])
    # nobody trained slot 3 of layer q
    last = (slice(None), 3) if factor == "B" else 3
    assert torch.equal(new.tensors[f"q.{factor}"][last], state.tensors[f"q.{factor}"][last])


@pytest.mark.parametrize("number", [0, 1])
def test_every_round_is_the_exact_mean_of_the_changes(number):
    chosen, state = make(number)
    updates = masked(chosen, state)
    found = change(state.spec, merged(chosen, state, updates), {})
    assert distance(found, mean_change(updates, {})) < 1e-6


def test_the_budget_is_the_rank_times_the_number_of_layers():
    chosen, state = make(trial_steps=7)
    for rank in (1, 2, 3):
        plan = planned(chosen, state, rank)
        assert (plan.rank, plan.slots, plan.trial_steps) == (4, 2 * rank, 7)
        assert chosen.broadcast(state, ClientInfo("ann", rank)).adapter.spec == state.spec
    whole = planned(chosen, state, 4)
    assert (whole.slots, whole.trial_steps) == (0, 0)


@pytest.mark.parametrize("number", [0, 1, 2, 3])
def test_with_every_slot_it_is_rolora(number):
    chosen, state = make(number, rate_ratio=1.0)
    rolora = RoLora(METHODS["lora"])
    plan, other = planned(chosen, state, 4), planned(rolora, state, 4)
    assert replace(plan, rates={}) == other
    updates = cohort(chosen, state)
    one = chosen.refactor(state, chosen.reduce(state, updates))
    two = rolora.refactor(state, rolora.reduce(state, updates))
    assert all(torch.equal(one.tensors[k], two.tensors[k]) for k in two.tensors)


@pytest.mark.parametrize("unit", ["record", "client"])
def test_the_choice_of_slots_voids_both_guarantees(unit):
    chosen, state = make()
    with pytest.raises(ConfigError, match=r"guarantee of: none\).*choose strategy .*ffa-lora"):
        check(chosen, state.spec, [4, 2], privacy=unit)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rate_ratio": 0.0}, "rate_ratio = 0; expected 0 < rate_ratio"),
        ({"rate_ratio": float("nan")}, "rate_ratio = nan"),
        ({"rate_ratio": float("inf")}, "rate_ratio = inf"),
        ({"trial_steps": -1}, "trial_steps = -1; expected at least 0"),
    ],
)
def test_options_that_cannot_be_used_are_refused(options, message):
    chosen, state = make(**options)
    with pytest.raises(ConfigError, match=message):
        check(chosen, state.spec, [4])
