"""Server optimisers against torch's own and the algorithm written out."""

from dataclasses import replace

import pytest
import torch

from fedlora.checkpoint import Committed
from fedlora.errors import ConfigError, StrategyError
from fedlora.server.rounds import resume_state
from fedlora.strategies.fold import add_fold
from fedlora.strategies.wrappers import WRAPPERS
from tests.server.cases import randn, random_state
from tests.strategies.rounds import make, update
from tests.strategies.wrappers.around import Products, check, crowd, next_state, wrapped

NAMES = ("fedadam", "fedyogi", "fedadagrad", "fedmomentum")


def rounds(chosen, state, count, size=1e-2):
    """[(state before, state after, pseudo-gradients)] of some rounds."""
    trace = []
    for number in range(count):
        updates = crowd(chosen, state, 3, size=size, seed=20 * number)
        plain = next_state(chosen.inner, state, updates)
        changes = {
            k: plain.tensors[k].double() - state.tensors[k].double()
            for k in updates[0].delta.tensors
        }
        new = next_state(chosen, state, updates)
        trace.append((state, new, changes))
        state = new
    return trace


def algorithm_2(name, changes, eta=1e-2, beta1=0.9, beta2=0.99, tau=1e-3):
    """Steps of one tensor, as Reddi et al. write them."""
    m, v, steps = 0.0, tau**2, []
    if name == "fedadagrad":
        beta1 = 0.0
    for d in changes:
        m = beta1 * m + (1 - beta1) * d
        if name == "fedadagrad":
            v = v + d**2
        elif name == "fedyogi":
            v = v - (1 - beta2) * d**2 * torch.sign(v - d**2)
        else:
            v = beta2 * v + (1 - beta2) * d**2
        steps.append(eta * m / (torch.sqrt(v) + tau))
    return steps


@pytest.mark.parametrize("name", ["fedadam", "fedyogi", "fedadagrad"])
def test_steps_are_those_of_algorithm_2(name):
    chosen, state, _ = wrapped(name)
    trace = rounds(chosen, state, 4)
    for tensor in state.tensors:
        steps = algorithm_2(name, [changes[tensor] for _, _, changes in trace])
        for (old, new, _), step in zip(trace, steps, strict=True):
            moved = new.tensors[tensor].double() - old.tensors[tensor].double()
            torch.testing.assert_close(moved, step, rtol=1e-4, atol=3e-7)


def test_fedadam_with_bias_correction_is_torchs_adam():
    """On the same pseudo-gradients, negated; eps is tau."""
    chosen, state, _ = wrapped("fedadam", options={"bias_correction": True})
    trace = rounds(chosen, state, 6)
    for tensor, first in state.tensors.items():
        parameter = torch.nn.Parameter(first.double())
        adam = torch.optim.Adam([parameter], lr=1e-2, betas=(0.9, 0.99), eps=1e-3)
        for _, new, changes in trace:
            parameter.grad = -changes[tensor]
            adam.step()
            torch.testing.assert_close(
                new.tensors[tensor].double(), parameter.detach(), rtol=1e-5, atol=1e-6
            )


def test_fedadagrad_is_torchs_adagrad():
    chosen, state, _ = wrapped("fedadagrad")
    trace = rounds(chosen, state, 5)
    for tensor, first in state.tensors.items():
        parameter = torch.nn.Parameter(first.double())
        adagrad = torch.optim.Adagrad(
            [parameter], lr=1e-2, initial_accumulator_value=1e-6, eps=1e-3
        )
        for _, new, changes in trace:
            parameter.grad = -changes[tensor]
            adagrad.step()
            torch.testing.assert_close(
                new.tensors[tensor].double(), parameter.detach(), rtol=1e-5, atol=1e-6
            )


def test_fedmomentum_is_torchs_sgd_with_momentum():
    chosen, state, _ = wrapped("fedmomentum", options={"eta": 0.5, "beta": 0.8})
    trace = rounds(chosen, state, 5)
    for tensor, first in state.tensors.items():
        parameter = torch.nn.Parameter(first.double())
        sgd = torch.optim.SGD([parameter], lr=0.5, momentum=0.8)
        for _, new, changes in trace:
            parameter.grad = -changes[tensor]
            sgd.step()
            torch.testing.assert_close(
                new.tensors[tensor].double(), parameter.detach(), rtol=1e-5, atol=1e-6
            )


@pytest.mark.parametrize(
    ("name", "options", "share"),
    [
        # v stays tau^2, so that the step is eta / (2 tau) of the mean
        ("fedadam", {"beta1": 0.0, "beta2": 1.0, "eta": 1e-3, "tau": 1e-3}, 0.5),
        ("fedyogi", {"beta1": 0.0, "beta2": 1.0, "eta": 4e-3, "tau": 1e-2}, 0.2),
        ("fedmomentum", {"beta": 0.0, "eta": 0.25}, 0.25),
        ("fedmomentum", {"beta": 0.0}, 1.0),
    ],
)
def test_without_memory_it_is_a_scaled_mean(name, options, share):
    chosen, state, _ = wrapped(name, options=options)
    for old, new, changes in rounds(chosen, state, 3):
        for tensor, change in changes.items():
            moved = new.tensors[tensor].double() - old.tensors[tensor].double()
            torch.testing.assert_close(moved, share * change, rtol=1e-4, atol=3e-7)


@pytest.mark.parametrize("name", NAMES)
def test_factors_that_are_trained_in_turn_move_in_turn(name):
    """Moments of a factor wait for the next round that trains it."""
    chosen, state, _ = wrapped(name, "rolora")
    trace = rounds(chosen, state, 4)
    for number, (old, new, _) in enumerate(trace):
        trained, frozen = ("B", "A") if number % 2 == 0 else ("A", "B")
        for layer in ("p", "q"):
            for moments in ("", f"opt.{name}.m."):
                key = f"{moments}{layer}.{frozen}"
                assert (key in old.tensors) == (key in new.tensors)
                if key in old.tensors:
                    assert torch.equal(old.tensors[key], new.tensors[key])
            key = f"{layer}.{trained}"
            assert not torch.equal(old.tensors[key], new.tensors[key])
    counts = trace[-1][1].extra[f"opt.{name}"]
    assert {counts[f"{layer}.{factor}"] for layer in "pq" for factor in "AB"} == {2}
    assert counts["head.weight"] == 4


@pytest.mark.parametrize("name", NAMES)
def test_a_state_read_from_disk_goes_on_alike(name):
    chosen, state, _ = wrapped(name)
    old = rounds(chosen, state, 2)[-1][1]
    record = {"run": "x", "extra": dict(old.extra)}
    blank = chosen.init(random_state(state.spec, 9))
    again = resume_state(Committed(2, old.tensors, record), blank)
    left, right = (next_state(chosen, s, crowd(chosen, s, 3, seed=60)) for s in (old, again))
    assert left.tensors.keys() == right.tensors.keys()
    assert all(torch.equal(left.tensors[k], right.tensors[k]) for k in left.tensors)
    assert left.extra == right.extra


@pytest.mark.parametrize("name", NAMES)
def test_the_global_adapter_and_broadcast_carry_no_moments(name):
    chosen, state, _ = wrapped(name)
    new = rounds(chosen, state, 1)[0][1]
    assert chosen.global_delta(new).tensors.keys() == state.tensors.keys()


@pytest.mark.parametrize("name", NAMES)
def test_factors_that_are_made_anew_have_no_moments(name):
    inner, state, _ = make("fedit")
    anew = WRAPPERS[name](Products(inner.traits))
    with pytest.raises(ConfigError, match=r"'products', which makes the factors anew.*moments"):
        check(anew, state)
    inner.personal = True
    with pytest.raises(ConfigError, match="a part stays at the clients"):
        check(WRAPPERS[name](inner), state)
    check(wrapped(name)[0], state, privacy="client")


def test_a_strategy_that_folds_is_stopped():
    chosen, state, _ = wrapped("fedadam")
    inner = chosen.inner

    class Folding(type(inner)):
        def refactor(self, state, stats):
            new = super().refactor(state, stats)
            pairs = {x.name: (randn(x.out, 1), randn(1, x.inp)) for x in state.spec.layers}
            return replace(new, tensors=add_fold(new.tensors, state.spec, new.round, pairs))

    folding = WRAPPERS["fedadam"](Folding(inner.traits))
    with pytest.raises(StrategyError, match="folds a part of every round into the base"):
        next_state(folding, state, [update(inner, state, "ann", 1)])


@pytest.mark.parametrize(
    ("name", "options", "why"),
    [
        ("fedadam", {"eta": 0.0}, "eta = 0; expected a number above 0"),
        ("fedadam", {"beta1": 1.0}, "beta1 = 1; expected a number from 0 to below 1"),
        ("fedyogi", {"beta2": 1.5}, "beta2 = 1.5; expected a number from 0 to 1"),
        ("fedadagrad", {"tau": 0.0}, "tau = 0; expected a number above 0"),
        ("fedmomentum", {"beta": -0.1}, "beta = -0.1; expected a number from 0 to below 1"),
    ],
)
def test_options_out_of_range_are_refused(name, options, why):
    with pytest.raises(ConfigError, match=why):
        wrapped(name, options=options)
