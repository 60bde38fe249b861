"""Adapters scored together against the same adapters scored one by one."""

import pytest
import torch

from fedlora.evaluate import batches, evaluate, evaluating
from fedlora.evaluate_many import Trial, tally_many
from fedlora.training.loss import loss_sum
from tests.training.test_cohort import METHODS, adapted, bert, classes, llama, starts, texts

__all__ = ["bert", "llama"]

# unequal numbers of unequal lengths, nothing at all, and a single one
SIZES = [[9, 3, 6, 4, 8, 2, 11], [5, 5, 5, 5], [], [12, 2, 7, 7, 3], [4]]
DATA = [texts(lengths, seed) for seed, lengths in enumerate(SIZES)]
BATCH = 2


def trials(made, data=DATA):
    return [
        Trial(start.tensors, examples)
        for start, examples in zip(starts(made, len(data)), data, strict=True)
    ]


def one_by_one(made, given, task):
    """(loss sum, count, correct) of each, with its adapter alone in the model."""
    found = []
    for trial in given:
        made.load(trial.tensors)
        total, count, correct = 0.0, 0, 0
        with evaluating(made.model):
            for batch in batches(trial.examples, 0, BATCH):
                part = loss_sum(made.model, batch, task)
                total += float(part.total)
                count += part.count
                correct += part.correct
        found.append((total, count, correct))
    return found


def together(made, given, task="causal-lm", width=8):
    return tally_many(made, given, task=task, pad_id=0, batch_size=BATCH, width=width)


def assert_equal(made, given, tolerance, task="causal-lm", **more):
    expected = one_by_one(made, given, task)
    found = together(made, given, task, **more)
    for tally, (total, count, correct) in zip(found, expected, strict=True):
        assert (tally.count, tally.correct) == (count, correct)
        assert tally.total == pytest.approx(total, rel=tolerance, abs=0.0)
    # adapters that differ have figures that do
    losses = [total / count for total, count, _ in expected if count]
    assert len(set(losses)) == len(losses) > 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_adapters_score_together_what_they_score_alone(llama, method, dtype):
    made = adapted(llama, method, dtype)
    assert_equal(made, trials(made), 1e-12 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("method", ["lora", "vera"])
def test_heads_are_every_adapters_own(bert, method):
    made = adapted(bert, method, heads=("classifier",), targets=["query", "value"])
    data = [classes(lengths, seed) for seed, lengths in enumerate(SIZES)]
    assert_equal(made, trials(made, data), 1e-12, "sequence-classification")


def test_dropout_is_for_training(llama):
    made = adapted(llama, dropout=0.5)
    made.model.train()
    assert_equal(made, trials(made), 1e-12)
    assert made.model.training


def test_tensors_that_do_not_differ_may_be_some_or_all(llama):
    """Shared A, own B; and one adapter on everybody's examples."""
    made = adapted(llama)
    given = trials(made)
    a = {name: value for name, value in given[0].tensors.items() if name.endswith(".A")}
    assert_equal(made, [Trial({**trial.tensors, **a}, trial.examples) for trial in given], 1e-12)
    assert_equal(made, [Trial(given[0].tensors, trial.examples) for trial in given], 1e-12)


def test_the_base_alone_is_a_model_like_another(llama):
    made = adapted(llama)
    given = [Trial(trial.tensors, trial.examples) for trial in trials(made)[:1] * 2]
    with made.base_only():
        first, second = together(made, given)
        alone = one_by_one(made, given, "causal-lm")[0]
    assert first == second
    assert first.total == pytest.approx(alone[0], rel=1e-12)
    assert first.total != pytest.approx(together(made, given)[0].total, rel=1e-3)


def test_the_order_is_that_in_which_they_were_given(llama):
    made = adapted(llama)
    given = trials(made)
    found = together(made, given)
    assert found[::-1] == together(made, given[::-1])


@pytest.mark.parametrize("width", [1, 2, 3])
def test_so_many_at_a_time_and_no_more(llama, width):
    made = adapted(llama)
    rows = []
    handle = made.model.get_submodule("model.layers.0").register_forward_pre_hook(
        lambda module, inputs: rows.append(len(inputs[0]))
    )
    try:
        together(made, trials(made), width=width)
    finally:
        handle.remove()
    # four of them have something, for 4, 3, 2 and 1 passes
    assert sum(rows) <= BATCH * (4 + 3 + 2 + 1)
    assert max(rows) == width * BATCH
    assert_equal(made, trials(made), 1e-12, width=width)


@pytest.mark.parametrize("room", [1, 2, 3])
def test_a_pass_that_does_not_fit_is_halved(llama, room):
    made = adapted(llama)
    given = trials(made)
    expected = one_by_one(made, given, "causal-lm")
    refused = []

    def refuse(module, inputs, output):
        rows = output[0] if isinstance(output, tuple) else output
        if len(rows) > BATCH * room:
            refused.append(len(rows))
            raise RuntimeError("CPU: can't allocate memory: you tried to allocate")

    handle = made.model.get_submodule("model.layers.0").register_forward_hook(refuse)
    try:
        found = together(made, given)
    finally:
        handle.remove()
    assert refused
    for tally, (total, count, correct) in zip(found, expected, strict=True):
        assert (tally.count, tally.correct) == (count, correct)
        assert tally.total == pytest.approx(total, rel=1e-12, abs=0.0)


def test_memory_for_none_is_an_error_and_leaves_the_model_whole(llama):
    made = adapted(llama)
    given = trials(made)
    expected = one_by_one(made, given, "causal-lm")

    def refuse(module, inputs):
        raise RuntimeError("CPU: can't allocate memory: you tried to allocate")

    handle = made.model.get_submodule("model.layers.0").register_forward_pre_hook(refuse)
    try:
        with pytest.raises(RuntimeError, match="allocate memory"):
            together(made, given)
    finally:
        handle.remove()
    assert one_by_one(made, given, "causal-lm") == expected


def test_nothing_makes_gradients(llama):
    made = adapted(llama)
    grads = []
    handle = made.model.get_submodule("model.layers.0").register_forward_pre_hook(
        lambda module, inputs: grads.append(inputs[0].requires_grad or torch.is_grad_enabled())
    )
    try:
        together(made, trials(made))
    finally:
        handle.remove()
    assert grads
    assert not any(grads)


def test_figures_are_those_of_evaluate(llama):
    made = adapted(llama)
    trial = trials(made)[0]
    made.load(trial.tensors)
    expected = evaluate(made.model, trial.examples, task="causal-lm", pad_id=0, batch_size=BATCH)
    (found, empty) = together(made, [trial, Trial(trial.tensors, [])])
    assert found.figures(trial.examples, "causal-lm") == pytest.approx(expected, rel=1e-12)
    assert empty.figures([], "causal-lm") == {}
    assert together(made, []) == []
