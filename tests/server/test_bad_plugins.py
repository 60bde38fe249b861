"""What a bad plug-in can do to a run: end it with its name, and nothing else."""

from dataclasses import replace

import pytest
import torch

from fedlora.adapter import AdapterState
from fedlora.errors import EXIT_FAILED, StrategyError
from fedlora.messages import Start
from fedlora.server.rounds import resume_state
from fedlora.strategies.fedit import FedIT
from fedlora.strategies.ffa_lora import FfaLora
from tests.server.toy import Run

STEPS = ("broadcast_key", "broadcast", "plan", "expect", "reduce", "refactor", "global_delta")


@pytest.fixture
def make(tmp_path):
    made = []

    def make_run(kind, **settings):
        made.append(Run(tmp_path / f"run{len(made)}", kind, **settings))
        return made[-1]

    yield make_run
    for run in made:
        run.store.close()


def bad(step, result, base=FedIT, round_=2):
    """`base` whose `step` gives result(what it should give) in one round."""

    def call(self, state, *args):
        good = getattr(base, step)(self, state, *args)
        # global_delta is asked about the state after the round
        number = state.round if step == "global_delta" else state.round + 1
        return result(good, state, *args) if number == round_ else good

    return type("Bad", (base,), {"name": "bad", step: call})


def fails(run, message):
    """The run ends in round 2 with this message, and round 1 stands."""
    with pytest.raises(StrategyError, match=message) as caught:
        run.go()
    text = str(caught.value)
    assert "'bad'" in text
    assert "round 2" in text
    assert "the run stands at round 1" in text
    assert caught.value.exit_code == EXIT_FAILED
    assert run.store.load().round == 1


def resumes(run, base):
    """With the plug-in mended, the run ends as one that never failed."""
    run.strategy = base(run.strategy.traits)
    return run.go()


def oops(good, *args):
    raise ZeroDivisionError("oops")


def ends(good, *args):
    raise SystemExit(0)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("how", [oops, ends])
def test_one_that_raises_is_named_with_round_and_function(make, step, how):
    run, clean = make(bad(step, how)), make(FedIT)
    kind = "ZeroDivisionError: oops" if how is oops else "SystemExit: 0"
    fails(run, f"failed in {step} of round 2: {kind}")
    found, expected = resumes(run, FedIT), clean.go()
    assert all(torch.equal(found.tensors[k], v) for k, v in expected.tensors.items())


@pytest.mark.parametrize(
    "step", ["broadcast", "plan", "expect", "reduce", "refactor", "global_delta"]
)
@pytest.mark.parametrize("value", [None, 3.0, "text", [1]])
def test_one_that_returns_another_type_is_told_so(make, step, value):
    run = make(bad(step, lambda good, *args: value))
    fails(run, rf"{step} returned.* a {type(value).__name__}; expected")
    assert resumes(run, FedIT).round == 3


def with_tensor(holder, name, change):
    tensors = dict(holder.tensors)
    tensors[name] = change(tensors[name])
    return replace(holder, tensors=tensors)


BAD_TENSORS = {
    "not finite": lambda t: t / 0.0,
    "has shape": lambda t: t[:1].clone(),
    "dtype torch.float64": lambda t: t.double(),
    "is a float": lambda t: 3.0,
}


@pytest.mark.parametrize("message", BAD_TENSORS)
def test_a_bad_tensor_is_named(make, message):
    change = BAD_TENSORS[message]
    steps = {
        "broadcast": lambda good, *args: replace(
            good, adapter=with_tensor(good.adapter, "q.B", change)
        ),
        "refactor": lambda good, *args: with_tensor(good, "q.B", change),
        "global_delta": lambda good, *args: with_tensor(good, "q.B", change),
    }
    for step, result in steps.items():
        run = make(bad(step, result))
        fails(run, rf"q\.B.*{message}|q\.B {message}")


CHANGED = {
    "the state": lambda state, updates: state.tensors["p.A"],
    "the start of client ann": lambda state, updates: updates[0].begin.tensors["p.A"],
}


@pytest.mark.parametrize("place", CHANGED)
def test_one_that_changes_its_input_is_told_which_tensor(make, place):
    """Clients of one rank share their start, here made of tensors that the state does not hold."""

    class Copies(FfaLora):
        def broadcast(self, state, client):
            adapter = super().broadcast(state, client).adapter
            tensors = {name: tensor.clone() for name, tensor in adapter.tensors.items()}
            return Start(replace(adapter, tensors=tensors))

    def result(good, state, updates):
        CHANGED[place](state, updates).mul_(1.0)
        return good

    run = make(bad("reduce", result, Copies), ranks=(1, 2, 1, 1))
    fails(run, f"reduce changed tensor p.A of {place} it was given; a strategy must return new")
    assert resumes(run, FfaLora).round == 3


def test_one_that_changes_the_next_state_while_it_is_measured(make):
    def result(good, state):
        state.tensors["p.A"].add_(1.0)
        return good

    fails(make(bad("global_delta", result)), "global_delta changed tensor p.A of the next state")


def other_spec(good, *args):
    return replace(good, spec=replace(good.spec, seed=good.spec.seed + 1))


OTHERS = {
    "refactor returned another spec": ("refactor", other_spec),
    "extra after refactor cannot be written as JSON": (
        "refactor",
        lambda good, *args: replace(good, extra={"when": {1, 2}}),
    ),
    "tensor name 'my tensor'": (
        "refactor",
        lambda good, *args: replace(good, tensors={**good.tensors, "my tensor": torch.ones(1)}),
    ),
    "the state lacks head.bias": (
        "refactor",
        lambda good, *args: replace(
            good, tensors={k: v for k, v in good.tensors.items() if k != "head.bias"}
        ),
    ),
    "the notes of reduce cannot be written as JSON": (
        "reduce",
        lambda good, *args: replace(good, notes={"nan": float("nan")}),
    ),
    "another spec than the global one": (
        "broadcast",
        lambda good, *args: Start(other_spec(good.adapter)),
    ),
    "has a tensor 'zzz'": (
        "global_delta",
        lambda good, *args: AdapterState(good.spec, {**good.tensors, "zzz": torch.ones(1)}),
    ),
    "the plan gives client ann rank 1, but broadcast rank 2": (
        "plan",
        lambda good, *args: replace(good, rank=1),
    ),
    "the plan for client ann trains factor 'C'": (
        "plan",
        lambda good, *args: replace(good, factors=("C",)),
    ),
    "expect names tensor p.C": (
        "expect",
        lambda good, *args: {**good, "p.C": (1, 1)},
    ),
    r"expect gives tensor p.A shape \(1, 1\)": (
        "expect",
        lambda good, *args: {**good, "p.A": (1, 1)},
    ),
}


@pytest.mark.parametrize("message", OTHERS)
def test_what_no_client_or_checkpoint_could_take_is_refused(make, message):
    step, result = OTHERS[message]
    run = make(bad(step, result))
    fails(run, message)
    assert resumes(run, FedIT).round == 3


def test_a_failed_round_leaves_the_checkpoint_readable(make):
    run = make(bad("refactor", oops))
    fails(run, "oops")
    initial = FedIT(run.strategy.traits).init(AdapterState(run.spec, {}))
    assert resume_state(run.store.load(), initial).round == 1
