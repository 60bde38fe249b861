"""SCAFFOLD: its algebra by hand, and its oracles through real clients."""

import dataclasses
from dataclasses import replace

import pytest
import torch

from fedlora.client.state import ClientState
from fedlora.errors import ConfigError, StrategyError
from fedlora.messages import RoundPlan
from fedlora.server.admission import expected_size
from fedlora.strategies.base import ClientInfo
from fedlora.strategies.wrappers import WRAPPERS
from fedlora.wire import decode_own
from tests.server.cases import randn
from tests.simulation.runs import Run
from tests.strategies.rounds import make
from tests.strategies.wrappers.around import Products, check, crowd, next_state, wrapped

SGD = {
    "optimizer": "sgd",
    "learning_rate": 0.2,
    "max_grad_norm": 0.0,
    "local_steps": 3,
    "batch_size": 4,
}


def with_control(updates, size=0.3):
    """Updates that also send random changes of control variates."""
    return [
        replace(
            u,
            control={
                k: size * randn(*t.shape, seed=31 * i + j)
                for j, (k, t) in enumerate(sorted(u.delta.tensors.items()))
            },
        )
        for i, u in enumerate(updates)
    ]


def sent(chosen, state):
    """Tensors of a client's delta; `expect` adds control variates to them."""
    plan = RoundPlan("run", state.round + 1, 0, "ann", (), 2, 1)
    return chosen.expect(state, chosen.plan(state, ClientInfo("ann", 2), plan))


@pytest.mark.parametrize(("strategy", "number"), [("fedit", 0), ("rolora", 0), ("rolora", 1)])
def test_control_variates_go_down_and_are_expected_back(strategy, number):
    chosen, state, _ = wrapped("scaffold", strategy, number=number)
    inner = sent(chosen.inner, state)
    assert sent(chosen, state) == {**inner, **{f"control.{k}": v for k, v in inner.items()}}
    start = chosen.broadcast(state, ClientInfo("ann", 2))
    assert {k: tuple(t.shape) for k, t in start.control.items()} == inner
    assert not any(bool(t.any()) for t in start.control.values())


@pytest.mark.parametrize("rate", [1.0, 0.5])
@pytest.mark.parametrize("clients", [3, 10])
def test_the_server_moves_by_the_unweighted_sum_over_all_clients(rate, clients):
    """Algorithm 1: c += |S| / N * mean; x += eta_g * (merged - x)."""
    inner, state, _ = make("fedit")
    chosen = WRAPPERS["scaffold"](inner, {"rate": rate})
    check(chosen, state, n=clients, optimizer="sgd")
    for _ in range(2):
        updates = with_control(crowd(inner, state, 3, seed=7 * state.round))
        new = next_state(chosen, state, updates)
        merged = next_state(inner, state, updates)
        for name in updates[0].delta.tensors:
            old = state.tensors.get(f"control.{name}", torch.zeros(()))
            mean = torch.stack([u.control[name].double() for u in updates]).mean(0)
            expected = (old.double() + 3 / clients * mean).float()
            torch.testing.assert_close(new.tensors[f"control.{name}"], expected)
            before = state.tensors[name].double()
            step = rate * (merged.tensors[name].double() - before)
            torch.testing.assert_close(new.tensors[name], (before + step).float())
        assert torch.equal(
            chosen.broadcast(new, ClientInfo("ann", 2)).control["p.A"], new.tensors["control.p.A"]
        )
        assert not any(k.startswith("control") for k in chosen.global_delta(new).tensors)
        state = new
    assert chosen.exact == (inner.exact and rate == 1.0)


def test_the_number_of_clients_is_that_of_the_federation_or_of_the_option():
    inner, state, _ = make("fedit")
    updates = with_control(crowd(inner, state, 3))
    blank = WRAPPERS["scaffold"](inner)
    with pytest.raises(StrategyError, match="does not know the number of clients"):
        next_state(blank, state, updates)
    check(blank, state, n=6, optimizer="sgd")
    named = WRAPPERS["scaffold"](inner, {"clients": 6})
    left, right = (next_state(some, state, updates).tensors for some in (blank, named))
    assert all(torch.equal(left[k], right[k]) for k in left)
    with pytest.raises(ConfigError, match="clients = 6, but the federation has 7"):
        check(named, state, n=7, optimizer="sgd")
    with pytest.raises(ConfigError, match="expected a rate above 0"):
        WRAPPERS["scaffold"](inner, {"rate": 0.0})


def test_what_control_variates_do_not_fit_is_refused():
    inner, state, _ = make("fedit")
    chosen = WRAPPERS["scaffold"](inner)
    check(chosen, state, optimizer="sgd", privacy="record")
    for given, why in (
        ({"optimizer": "adamw"}, "needs plain SGD"),
        ({"optimizer": "sgd", "momentum": 0.9}, "with momentum 0.9"),
        ({"optimizer": "sgd", "asynchronous": True}, '"async" does not fit'),
        ({"optimizer": "sgd", "privacy": "client"}, "is voided by wrapper"),
    ):
        with pytest.raises(ConfigError, match=why):
            check(chosen, state, **given)
    anew = WRAPPERS["scaffold"](Products(inner.traits))
    with pytest.raises(ConfigError, match="makes the factors anew"):
        check(anew, state, optimizer="sgd")
    rolora, state, _ = make("rolora")
    with pytest.raises(ConfigError, match="wrapper 'scaffold' needs equal ranks"):
        check(WRAPPERS["scaffold"](rolora), state, ranks=[1, 2], optimizer="sgd")
    for name in ("krum", "norm-cap", "scaffold"):
        nested = WRAPPERS["scaffold"](WRAPPERS[name](inner))
        with pytest.raises(ConfigError, match=f"wrapper '{name}' stands inside scaffold"):
            check(nested, state, optimizer="sgd")
        if name != "scaffold":
            check(WRAPPERS[name](chosen), state, optimizer="sgd")


def test_a_strategy_whose_clients_choose_slots_is_stopped():
    inner, state, _ = make("fedit")

    class Sparse(type(inner)):
        def plan(self, state, client, plan):
            return replace(super().plan(state, client, plan), slots=2)

    with pytest.raises(StrategyError, match="lets client 'ann' choose 2"):
        sent(WRAPPERS["scaffold"](Sparse(inner.traits)), state)


@pytest.fixture
def go(make_job, tmp_path):
    """A finished run; `wrappers` may be left out."""

    def start(name, clients=3, data=None, rounds=3, scaffold=True, strategy="fedit", **training):
        wrappers = [{"name": "scaffold"}] if scaffold else []
        job = make_job(
            partition={"clients": clients},
            federation={
                "rounds": rounds,
                "wrappers": wrappers,
                "strategy": strategy,
                "weighting": "uniform",
            },
            training={**SGD, **training},
        )
        run = Run(job, tmp_path / name, clients=data)
        run.final = run.go()
        return run

    return start


def own(run):
    """Client -> its control variates after the last round."""
    found = {}
    for name in run.federation.clients:
        memory = ClientState(run.folder / "clients" / name).before(run.final.round + 1)
        found[name] = {
            k.removeprefix("control."): t.double()
            for k, t in memory.items()
            if k.startswith("control.")
        }
    return found


def servers(run):
    return {
        k.removeprefix("control."): t.double()
        for k, t in run.final.tensors.items()
        if k.startswith("control.")
    }


def test_one_client_alone_does_plain_sgd(go):
    """c and its c_i are the same, up to rounding of their sums."""
    plain, corrected = go("plain", clients=1, scaffold=False), go("scaffold", clients=1)
    for name, tensor in plain.final.tensors.items():
        torch.testing.assert_close(corrected.final.tensors[name], tensor, rtol=1e-5, atol=1e-6)
    assert any(float(t.abs().max()) > 1e-2 for t in servers(corrected).values())


@pytest.mark.parametrize("strategy", ["fedit", "ffa-lora", "rolora"])
def test_the_clients_variates_sum_to_n_times_the_servers(go, strategy):
    """Full participation from zero; with factors in turn, each keeps its own meanwhile."""
    run = go("run", rounds=4, strategy=strategy)
    total, clients = servers(run), own(run)
    factors = {name for name in total if name.rpartition(".")[2] in "AB"}
    assert {name[-1] for name in factors} == ({"B"} if strategy == "ffa-lora" else {"A", "B"})
    for name, value in total.items():
        held = torch.stack([variates[name] for variates in clients.values()])
        torch.testing.assert_close(held.sum(0), 3 * value, rtol=1e-5, atol=1e-6)
        assert float((held - held.mean(0)).abs().max()) > 1e-4


def test_identical_clients_hold_what_the_server_holds(go, make_job):
    """Whole batches, so that the order of data, which names draw, changes nothing."""
    data = go("shape", rounds=1).loaded.data.clients
    one = dataclasses.replace(next(iter(data.values())))
    run = go("run", data=dict.fromkeys(data, one), batch_size=len(one.train))
    for variates in own(run).values():
        for name, value in servers(run).items():
            torch.testing.assert_close(variates[name], value, rtol=1e-4, atol=1e-6)


def test_clients_step_along_their_gradient_less_their_own_plus_the_servers_variate(go):
    """One whole-batch step a round, so that c_i is the client's last gradient.

    The corrections sum to zero, so that the run without them visits the same global adapters,
    and each client's delta there is -eta times its gradient.
    """
    plain, corrected = (
        [{r.client: decode_own(r.payload) for r in replies} for replies in run.tap.replies]
        for run in (
            go(name, scaffold=name == "scaffold", local_steps=1, batch_size=40)
            for name in ("plain", "scaffold")
        )
    )
    for before, now, found in zip(plain, plain[1:], corrected[1:], strict=False):
        for name in now["client-000"]:
            deltas = torch.stack([before[client][name] for client in before])
            # clients differ (A has no gradient while B is zero)
            assert name.endswith(".A") or float((deltas - deltas.mean(0)).abs().max()) > 1e-4
            for client, last in zip(before, deltas, strict=True):
                expected = now[client][name] + deltas.mean(0) - last
                torch.testing.assert_close(found[client][name], expected, rtol=1e-3, atol=1e-6)


def test_a_run_in_pieces_equals_a_run_in_one_and_sends_twice_as_much(go, make_job, tmp_path):
    whole = go("whole", strategy="rolora", rounds=4)
    pieces = Run(whole.job, tmp_path / "pieces")
    for until in (1, 2, 4):
        pieces.go(until)
    assert whole.adapters() == pieces.adapters()
    assert whole.file(4) == pieces.file(4)
    strategy, state = whole.federation.strategy, whole.final
    both = sent(strategy, state)
    assert len(both) == 2 * len(sent(strategy.inner, state))
    for reply in whole.tap.replies[0]:
        assert len(reply.payload) == expected_size(both)
    errors = [event["aggregation_error"] for event in whole.of("round")]
    assert max(errors) < 1e-5
