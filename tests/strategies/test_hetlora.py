"""HetLoRA against dense sums over zero-padded factors."""

from dataclasses import replace

import pytest
import torch

from fedlora.adapter import AdapterState
from fedlora.adapters import METHODS
from fedlora.errors import ConfigError
from fedlora.messages import RoundPlan
from fedlora.strategies.base import ClientInfo
from fedlora.strategies.hetlora import HetLora
from tests.server.cases import make_spec, random_state
from tests.strategies.rounds import NAMES, check, cohort, make, merged, update


def het(rank=4, seed=0, **options):
    chosen = HetLora(METHODS["lora"], options)
    return chosen, chosen.init(random_state(make_spec(rank=rank), seed))


def norm(up, layer):
    scale = up.delta.spec.layer(layer).scale
    return float((scale * up.ended[f"{layer}.B"] @ up.ended[f"{layer}.A"]).norm())


def padded(tensor, factor, rank):
    full = torch.zeros(*((rank, tensor.shape[1]) if factor == "A" else (tensor.shape[0], rank)))
    full = full.double()
    if factor == "A":
        full[: tensor.shape[0]] = tensor
    else:
        full[:, : tensor.shape[1]] = tensor
    return full


@pytest.mark.parametrize("sparsity", [True, False])
@pytest.mark.parametrize("ranks", [(4, 4, 4, 4), (4, 1, 2, 3), (4, 2, 2, 2)])
def test_the_mean_of_padded_factors(ranks, sparsity):
    """g_i proportional to p_i |dW_i|, layer by layer, or to p_i alone; the weights sum to 1."""
    chosen, state = het(sparsity=sparsity)
    updates = cohort(chosen, state, ranks)
    found = merged(chosen, state, updates)
    for layer in ("p", "q"):
        g = [up.weight * (norm(up, layer) if sparsity else 1.0) for up in updates]
        for factor in "AB":
            name = f"{layer}.{factor}"
            mean = sum(
                w / sum(g) * padded(up.ended[name], factor, 4)
                for w, up in zip(g, updates, strict=True)
            )
            torch.testing.assert_close(found[name], mean, rtol=1e-12, atol=1e-12)
    p = [up.weight / sum(u.weight for u in updates) for up in updates]
    head = sum(w * up.trained["head.weight"] for w, up in zip(p, updates, strict=True))
    torch.testing.assert_close(found["head.weight"], head, rtol=1e-12, atol=1e-12)


def test_equal_norms_and_ranks_give_fedit():
    """Rotating a client's A leaves |B A| as it is, and makes clients that differ."""
    chosen, state = het(rank=2)
    fedit, _, _ = make("fedit", rank=2)
    one = update(chosen, state, "ann", 1)
    updates = []
    for name, weight, sign in zip(NAMES, (3.0, 1.0, 7.5, 2.0), (1, -1, 1, -1), strict=True):
        ended = {k: (sign * v if k.endswith(".A") else v) for k, v in one.ended.items()}
        delta = {k: ended[k] - one.start.tensors[k].double() for k in one.delta.tensors}
        updates.append(
            replace(one, client=name, weight=weight, delta=AdapterState(one.delta.spec, delta))
        )
    found, expected = merged(chosen, state, updates), merged(fedit, state, updates)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-12, atol=1e-12)


def still(up, factor="B"):
    """The client, ended with zeros in one factor."""
    delta = {
        k: (-up.start.tensors[k].double() if k.endswith(f".{factor}") else v)
        for k, v in up.delta.tensors.items()
    }
    return replace(up, delta=AdapterState(up.delta.spec, delta))


def test_a_client_without_a_change_has_no_weight():
    chosen, state = het()
    updates = cohort(chosen, state)
    found = merged(chosen, state, [*updates[:3], still(updates[3])])
    expected = merged(chosen, state, updates[:3])
    for name in ("p.A", "p.B", "q.A", "q.B"):
        torch.testing.assert_close(found[name], expected[name], rtol=1e-12, atol=1e-12)


def test_where_nobody_has_changed_examples_weigh():
    chosen, state = het()
    updates = [still(up) for up in cohort(chosen, state)]
    total = sum(up.weight for up in updates)
    mean = sum(up.weight / total * up.ended["p.A"] for up in updates)
    torch.testing.assert_close(merged(chosen, state, updates)["p.A"], mean)


def test_truncating_the_mean_is_the_mean_of_the_truncated():
    """For slots that all clients hold: what one of rank 2 receives is the mean of its slots."""
    chosen, state = het(sparsity=False)
    updates = cohort(chosen, state, (4, 2, 3, 2))
    new = chosen.refactor(state, chosen.reduce(state, updates))
    start = chosen.broadcast(new, ClientInfo("zoe", 2)).adapter.tensors
    total = sum(up.weight for up in updates)
    mean = sum(up.weight / total * up.ended["p.B"][:, :2] for up in updates)
    torch.testing.assert_close(start["p.B"].double(), mean, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("sparsity", [True, False])
def test_a_slot_without_an_owner_keeps_its_value(sparsity):
    chosen, state = het(sparsity=sparsity)
    updates = cohort(chosen, state, (1, 2, 2, 1))
    new = chosen.refactor(state, chosen.reduce(state, updates))
    for name, cut in (("p.A", lambda t: t[2:]), ("q.B", lambda t: t[:, 2:])):
        assert torch.equal(cut(new.tensors[name]), cut(state.tensors[name]))
        assert not torch.equal(new.tensors[name], state.tensors[name])


def test_an_owner_without_weight_is_none():
    """Its only owner has not moved: with zero weight on both halves the slot would be dead."""
    chosen, state = het()
    updates = cohort(chosen, state, (4, 1, 1, 1))
    new = chosen.refactor(state, chosen.reduce(state, [still(updates[0]), *updates[1:]]))
    assert torch.equal(new.tensors["p.A"][1:], state.tensors["p.A"][1:])
    assert torch.equal(new.tensors["p.B"][:, 1:], state.tensors["p.B"][:, 1:])


def planned(chosen, state, rank):
    blank = RoundPlan("run", 1, 0, "ann", (), rank, 1)
    return chosen.plan(state, ClientInfo("ann", rank), blank)


def test_the_tail_begins_at_gamma_of_the_rank():
    chosen, state = het(gamma=0.6, penalty=0.5, r_min=2)
    found = [(p.tail_slot, p.tail_weight) for r in (4, 3, 2, 1) if (p := planned(chosen, state, r))]
    # 0.6 * 4 and 0.6 * 3 rounded down, but never below r_min; nothing to prune at or below it
    assert found == [(2, 0.5), (2, 0.5), (0, 0.0), (0, 0.0)]
    assert planned(*het(gamma=1.0), 4).tail_weight == 0.0


def shrunk(up, factor):
    """The client, ended with its start times `factor`."""
    delta = {k: (factor - 1) * up.start.tensors[k].double() for k in up.delta.tensors}
    return replace(up, delta=AdapterState(up.delta.spec, delta))


def test_who_ends_with_a_smaller_tail_holds_fewer_slots_from_then_on():
    chosen, state = het(gamma=0.5)
    updates = cohort(chosen, state, (4, 4, 3, 1))
    updates = [shrunk(up, f) for up, f in zip(updates, (0.9, 1.1, 0.9, 0.9), strict=True)]
    stats = chosen.reduce(state, updates)
    assert stats.notes == {"pruned": {"ann": 2, "cyd": 1}}
    new = chosen.refactor(state, stats)
    held = (4, 4, 3, 1)
    ranks = [chosen.rank(new, ClientInfo(n, r)) for n, r in zip(NAMES, held, strict=True)]
    assert ranks == [2, 4, 1, 1]
    assert chosen.broadcast(new, ClientInfo("ann", 4)).adapter.spec.rank == 2
    # a round later, without ann, her rank is still known
    later = chosen.refactor(new, chosen.reduce(new, [shrunk(update(chosen, new, "bob", 1), 0.5)]))
    assert later.extra["ranks"] == {"ann": 2, "bob": 2, "cyd": 1}


def test_a_zero_tail_at_the_start_is_no_reason_to_prune():
    """In round 1 every B is zero, so no tail can be smaller than it was."""
    chosen, state = het()
    tensors = {k: v * 0 if k.endswith(".B") else v for k, v in state.tensors.items()}
    state = replace(state, tensors=tensors)
    assert chosen.reduce(state, cohort(chosen, state)).notes == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gamma": 0.0}, "gamma = 0; expected 0 < gamma <= 1"),
        ({"gamma": float("nan")}, "gamma = nan"),
        ({"penalty": -1.0}, "penalty = -1; expected"),
        ({"penalty": float("nan")}, "penalty = nan"),
        ({"r_min": 0}, "r_min = 0; expected at least 1"),
    ],
)
def test_options_that_cannot_be_used_are_refused(options, message):
    chosen, state = het(**options)
    with pytest.raises(ConfigError, match=message):
        check(chosen, state.spec, [4])
