"""Rounds of LoRA-LEGO against plain sums of products; the clustering has tests of its own."""

from dataclasses import replace

import pytest
import torch

from fedlora.adapter import AdapterState
from fedlora.adapters import METHODS
from fedlora.errors import ConfigError
from fedlora.strategies.base import ClientInfo
from fedlora.strategies.lora_lego import LoraLego
from tests.server.cases import make_spec, random_state
from tests.strategies.quadratic import relative_error, run, targets
from tests.strategies.rounds import change, check, cohort, distance, mean_change, update

TWO = {"ann": 3.0, "bob": 9.0}


def make(rank=4, seed=0, **options):
    chosen = LoraLego(METHODS["lora"], options)
    return chosen, chosen.init(random_state(make_spec(rank=rank), seed))


def after(chosen, state, updates):
    return chosen.refactor(state, chosen.reduce(state, updates))


def ending_at(up, tensors):
    """The client, as if it had ended with these factors."""
    delta = {k: tensors[k].double() - up.start.tensors[k] for k in up.delta.tensors}
    return replace(up, delta=AdapterState(up.delta.spec, delta))


def permuted(tensors, spec, seed):
    """The same adapter with its slots in another order."""
    order = torch.randperm(spec.rank, generator=torch.Generator().manual_seed(seed))
    found = dict(tensors)
    for layer in spec.layers:
        found[f"{layer.name}.A"] = tensors[f"{layer.name}.A"][order]
        found[f"{layer.name}.B"] = tensors[f"{layer.name}.B"][:, order]
    return found


def product(state):
    return change(state.spec, state.tensors, {})


@pytest.mark.parametrize("options", [{}, {"balance": False}, {"sign_align": False}])
def test_as_many_units_as_slots_give_the_exact_mean(options):
    """Two clients of rank 2 and a global rank of 4: every unit is its own cluster."""
    chosen, state = make(**options)
    updates = [update(chosen, state, n, i, w, 2) for i, (n, w) in enumerate(TWO.items())]
    assert distance(product(after(chosen, state, updates)), mean_change(updates, {})) < 1e-6


def test_paper_mode_adds_up():
    """The sum of the LoRAs, times sqrt(mean rank / clusters) unless that is switched off."""
    for on, factor in ((False, 1.0), (True, (2 / 4) ** 0.5)):
        chosen, state = make(mode="paper", output_reweight=on)
        updates = [update(chosen, state, n, i, w, 2) for i, (n, w) in enumerate(TWO.items())]
        parts = [change(u.delta.spec, u.ended, {}) for u in updates]
        total = {name: factor * sum(part[name] for part in parts) for name in parts[0]}
        assert distance(product(after(chosen, state, updates)), total) < 1e-6


@pytest.mark.parametrize("mode", ["mass", "paper"])
def test_permuted_copies_are_one_adapter(mode):
    chosen, state = make(mode=mode)
    goal = random_state(state.spec, 7).tensors
    updates = [
        ending_at(up, permuted(goal, state.spec, seed))
        for seed, up in enumerate(cohort(chosen, state))
    ]
    found = product(after(chosen, state, updates))
    assert distance(found, change(state.spec, goal, {})) < 1e-6


def test_the_order_of_the_slots_of_any_client_does_not_matter():
    chosen, state = make()
    updates = cohort(chosen, state)
    turned = [
        ending_at(up, permuted(up.ended, state.spec, seed)) for seed, up in enumerate(updates)
    ]
    assert any(
        not torch.equal(u.ended["p.A"], t.ended["p.A"])
        for u, t in zip(updates, turned, strict=True)
    )
    found = product(after(chosen, state, turned))
    assert distance(found, product(after(chosen, state, updates))) < 1e-6


def test_clients_of_any_rank_give_and_get_the_heaviest_units():
    chosen, state = make()
    check(chosen, state.spec, [2, 4, 3, 1])
    new = after(chosen, state, cohort(chosen, state, (2, 4, 3, 1)))
    for layer in new.spec.layers:
        b, a = new.tensors[f"{layer.name}.B"], new.tensors[f"{layer.name}.A"]
        size = b.norm(dim=0) * a.norm(dim=1)
        assert bool((size[:-1] >= size[1:] * (1 - 1e-6)).all())
        start = chosen.broadcast(new, ClientInfo("ann", 2)).adapter.tensors
        assert torch.equal(start[f"{layer.name}.B"], b[:, :2])
        assert torch.equal(start[f"{layer.name}.A"], a[:2])


def test_a_slot_without_a_unit_can_learn():
    """One client of rank 1 in a global rank of 4: three slots are new, and change nothing."""
    chosen, state = make()
    one = update(chosen, state, "ann", 1, rank=1)
    new = after(chosen, state, [one])
    assert distance(product(new), mean_change([one], {})) < 1e-6
    for layer in new.spec.layers:
        b, a = new.tensors[f"{layer.name}.B"], new.tensors[f"{layer.name}.A"]
        assert bool((b[:, 1:] == 0).all())
        assert bool((a[1:].norm(dim=1) > 0.1).all())
        gram = a @ a.T
        assert float((gram - gram.diag().diag()).abs().max()) < 1e-6


def test_where_nothing_has_moved_a_stays():
    chosen, state = make()
    tensors = {k: v * 0 if k.endswith(".B") else v for k, v in state.tensors.items()}
    state = replace(state, tensors=tensors)
    updates = [ending_at(up, tensors) for up in cohort(chosen, state)]
    new = after(chosen, state, updates)
    for name in ("p.A", "p.B", "q.A", "q.B"):
        assert torch.equal(new.tensors[name], tensors[name])


def test_the_same_round_gives_the_same_bits_and_another_draws_anew():
    chosen, state = make()
    updates = cohort(chosen, state)
    first, again = after(chosen, state, updates), after(chosen, state, updates)
    assert all(torch.equal(first.tensors[k], again.tensors[k]) for k in first.tensors)
    one = [update(chosen, state, "ann", 1, rank=1)]
    later = after(chosen, replace(state, round=1), one)
    assert not torch.equal(later.tensors["p.A"], after(chosen, state, one).tensors["p.A"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "mas"}, r'mode = "mas" is not known.*did you mean "mass"'),
        ({"n_init": 0}, "n_init = 0; expected at least 1"),
        ({"max_iter": 0}, "max_iter = 0; expected at least 1"),
        ({"param_reweight": 1}, "param_reweight = 1; expected true or false"),
    ],
)
def test_options_that_cannot_be_used_are_refused(options, message):
    chosen, state = make(**options)
    with pytest.raises(ConfigError, match=message):
        check(chosen, state.spec, [4])


def test_old_moments_mean_nothing_to_new_factors():
    chosen, state = make()
    with pytest.raises(ConfigError, match='choose "reset"'):
        check(chosen, state.spec, [4], optimizer_state="keep")


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_unlike_clients_leave_it_near_fedit(seed):
    """Quadratic, h = 2, 20 local steps: centroids, too, lose what members do not share."""
    common, goals = targets(2.0, seed)
    fedit, lego, ffa = (
        relative_error(run(name, goals, seed=seed), common)
        for name in ("fedit", "lora-lego", "ffa-lora")
    )
    assert abs(lego - fedit) < 0.05
    assert lego < 0.8 * ffa


def test_alike_clients_are_one_client():
    common, goals = targets(0.0, 0)
    assert relative_error(run("lora-lego", goals), common) < 1e-3
