"""FedSA-LoRA: what is sent, what stays, and what the mean is."""

from dataclasses import replace

import pytest
import torch

from fedlora.adapter import AdapterState
from fedlora.errors import ConfigError
from fedlora.messages import HEADS, RoundPlan
from fedlora.strategies.base import ClientInfo
from tests.strategies.rounds import check, cohort, expected, make

# (factor that stays, factor that is averaged)
FACTORS = {"lora": ("B", "A"), "rslora": ("B", "A"), "pissa": ("B", "A"), "vera": ("b", "v")}


@pytest.mark.parametrize("method", FACTORS)
def test_both_factors_are_trained_and_one_is_sent(method):
    chosen, state, _ = make("fedsa-lora", method)
    own, shared = FACTORS[method]
    blank = RoundPlan("run", 1, 0, "ann", (), 2, 1)
    plan = chosen.plan(state, ClientInfo("ann", 2), blank)
    assert set(plan.factors) == {own, shared}
    assert set(plan.kept) == {own, HEADS}
    assert plan.sent == (shared,)
    names = expected(chosen, state, ClientInfo("ann", 2))
    assert set(names) == {f"p.{shared}", f"q.{shared}"}


@pytest.mark.parametrize("method", FACTORS)
def test_the_shared_factor_is_the_mean_and_nothing_else_moves(method):
    chosen, state, _ = make("fedsa-lora", method)
    updates = cohort(chosen, state)
    new = chosen.refactor(state, chosen.reduce(state, updates))
    total = sum(up.weight for up in updates)
    _, shared = FACTORS[method]
    for name, old in state.tensors.items():
        if name.endswith(f".{shared}") and "head" not in name:
            mean = sum(up.weight / total * up.trained[name] for up in updates)
            torch.testing.assert_close(new.tensors[name].double(), mean, rtol=1e-6, atol=1e-6)
        else:
            assert torch.equal(new.tensors[name], old)


def test_identical_clients_share_what_fedit_would():
    """With one update for all, A is that of FedIT; B is the client's own either way."""
    fedsa, state, _ = make("fedsa-lora", heads=False)
    fedit, same, _ = make("fedit", heads=False)
    one = cohort(fedit, same)[0]
    sent = {name: one.delta.tensors[name] for name in expected(fedsa, state, ClientInfo("ann", 2))}
    delta = AdapterState(one.delta.spec, sent)
    twins = [replace(one, client=name, delta=delta) for name in ("ann", "bob")]
    found = fedsa.refactor(state, fedsa.reduce(state, twins))
    whole = fedit.refactor(same, fedit.reduce(same, [one]))
    assert all(torch.equal(found.tensors[f"{x}.A"], whole.tensors[f"{x}.A"]) for x in "pq")


def test_what_it_takes():
    chosen, state, _ = make("fedsa-lora")
    for unit in ("record", "client"):
        check(chosen, state.spec, [2, 2], privacy=unit)
    with pytest.raises(ConfigError, match="needs equal ranks"):
        check(chosen, state.spec, [2, 1])
