"""FedProx: what it asks of clients, and what they make of it in a real run."""

import pytest
import torch

from fedlora.errors import ConfigError
from fedlora.messages import RoundPlan
from fedlora.strategies.base import ClientInfo
from fedlora.wire import decode_own
from tests.simulation.runs import Run
from tests.strategies.rounds import make
from tests.strategies.wrappers.around import check, crowd, next_state, wrapped


@pytest.mark.parametrize("space", ["factor", "product"])
def test_the_plan_carries_the_penalty_and_the_server_does_nothing(space):
    chosen, state, _ = wrapped("fedprox", "rolora", options={"mu": 0.5, "space": space})
    blank = RoundPlan("run", 1, 0, "ann", (), 2, 1)
    plan = chosen.plan(state, ClientInfo("ann", 2), blank)
    assert plan.factors == ("B",)
    assert (plan.proximal, plan.proximal_product) == (0.5, space == "product")
    updates = crowd(chosen, state, 3)
    left, right = (next_state(some, state, updates).tensors for some in (chosen, chosen.inner))
    assert all(torch.equal(left[k], right[k]) for k in left)
    assert (chosen.exact, chosen.linear, chosen.hetero_rank) == (True, True, True)
    check(chosen, state, ranks=[2, 1, 2], privacy="client")


def test_options_and_methods_that_do_not_fit_are_refused():
    with pytest.raises(ConfigError, match="mu = 0; expected a weight above 0"):
        wrapped("fedprox", options={"mu": 0.0})
    chosen, state, _ = wrapped("fedprox", "fedit", "dora", options={"space": "product"})
    with pytest.raises(ConfigError, match="which method 'dora' is not"):
        check(chosen, state)
    chosen, state, _ = wrapped("fedprox", "fedit", "dora")
    check(chosen, state)
    inner, state, _ = make("fedit")
    inner.personal = True
    check(type(chosen)(inner, {"space": "product"}), state)


def largest(make_job, folder, wrappers, rate, steps=40):
    """Norm of the largest delta that a client sends in the second round."""
    job = make_job(
        federation={"rounds": 2, "wrappers": wrappers},
        training={
            "optimizer": "sgd",
            "learning_rate": rate,
            "max_grad_norm": 0.0,
            "local_steps": steps,
            "batch_size": 40,
        },
    )
    run = Run(job, folder)
    run.go()
    deltas = [decode_own(reply.payload).values() for reply in run.tap.replies[1]]
    return max(float(torch.cat([t.flatten() for t in d]).norm()) for d in deltas)


@pytest.mark.parametrize("space", ["factor", "product"])
def test_a_heavy_penalty_returns_the_broadcast(make_job, tmp_path, space):
    """mu -> infinity at a rate of 1 / (2 mu): the delta falls like 1 / mu."""
    if space == "factor":
        found = []
        for mu in (10.0, 1000.0):
            wrapper = {"name": "fedprox", "mu": mu, "space": space}
            found.append(largest(make_job, tmp_path / f"{mu:g}", [wrapper], 0.5 / mu))
        assert found[1] < 0.02 * found[0]
    mu, rate = 10.0, 0.05
    wrapper = {"name": "fedprox", "mu": mu, "space": space}
    held = largest(make_job, tmp_path / "held", [wrapper], rate)
    free = largest(make_job, tmp_path / "free", [], rate)
    assert held < 0.3 * free
