"""Local training against gradients and steps written out by hand."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from fedlora.adapters.inject import adapt
from fedlora.config.job import ModelSection, TrainingSection
from fedlora.data.example import IGNORE, Example, collate
from fedlora.errors import TrainingError
from fedlora.models.fingerprint import fingerprint
from fedlora.models.loading import load_base
from fedlora.training.loss import loss_sum
from fedlora.training.optimizer import learning_rate, make_optimizer, optimizer_tensors
from fedlora.training.trainer import LocalWork, train

WORK = LocalWork(("A", "B"), steps=3, first_step=0, total_steps=9, seed=0, client="c", round=1)
PLAIN = TrainingSection(
    batch_size=2, optimizer="sgd", learning_rate=0.5, max_grad_norm=0.0, local_steps=3
)
ADAMW = PLAIN.model_copy(update={"optimizer": "adamw", "learning_rate": 1e-2})


def texts(lengths, seed=0, counted=None):
    """Random token sequences; only the last `counted` targets count, by default all but one."""
    draws = torch.Generator().manual_seed(seed)
    examples = []
    for i, length in enumerate(lengths):
        ids = torch.randint(3, 16, (length,), generator=draws)
        target = ids.clone()
        target[: length - counted[i] if counted else 1] = IGNORE
        examples.append(Example({"input_ids": ids}, target))
    return examples


EXAMPLES = texts([9, 3, 6, 4, 8, 2, 5], counted=[8, 1, 2, 3, 4, 1, 4])


@pytest.fixture(scope="module")
def base(tiny_folder):
    section = ModelSection(name=str(tiny_folder), task="causal-lm")
    return load_base(section, labels=(), pad_id=0, seed=0).model


@pytest.fixture
def make(base):
    """A fresh adapter with random factors on a copy of the tiny model."""

    def make_model(method="lora", dropout=0.0, dtype=torch.float32):
        made = adapt(
            copy.deepcopy(base).to(dtype),
            method=method,
            rank=2,
            alpha=None,
            targets=["q_proj", "down_proj"],
            heads=(),
            base_fingerprint="",
            seed=0,
            dropout=dropout,
        )
        draws = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in made.parameters().values():
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=draws))
        return made

    return make_model


def factors(made):
    return {name: value.detach().clone() for name, value in made.parameters().items()}


def run(made, work=WORK, settings=PLAIN, examples=EXAMPLES, **more):
    return train(made, examples, work, settings, task="causal-lm", pad_id=0, **more)


def same_bits(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def largest_gap(left, right):
    assert left.keys() == right.keys()
    return max(float((left[k] - right[k]).abs().max()) for k in left)


def mean_loss(made, examples):
    """Mean over all counted tokens, one text at a time, without padding or the library's sums."""
    total, count = torch.zeros(()), 0
    for example in examples:
        logits = made.model(input_ids=example.inputs["input_ids"][None]).logits[0]
        for place in range(1, len(example.target)):
            if example.target[place] != IGNORE:
                total = total - F.log_softmax(logits[place - 1], 0)[example.target[place]]
                count += 1
    return total / count


def hand_made_step(made, examples, rate, clip=math.inf):
    """One step of plain gradient descent on the mean over all tokens."""
    parameters = made.train_only(("A", "B"))
    loss = mean_loss(made, examples)
    grads = dict(zip(parameters, torch.autograd.grad(loss, parameters.values()), strict=True))
    norm = math.sqrt(sum(float((g**2).sum()) for g in grads.values()))
    shrink = min(1.0, clip / (norm + 1e-6))
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter -= rate * shrink * grads[name]
    return float(loss.detach()), norm


def test_a_sgd_step_is_the_gradient_of_the_mean_over_tokens(make):
    made, reference = make(), make()
    settings = PLAIN.model_copy(update={"batch_size": len(EXAMPLES)})
    result = run(made, replace(WORK, steps=1), settings)
    loss, _ = hand_made_step(reference, EXAMPLES, 0.5)
    assert result.loss == pytest.approx(loss, abs=1e-6)
    assert result.count == sum(int((e.target != IGNORE).sum()) for e in EXAMPLES)
    assert largest_gap(factors(made), factors(reference)) < 1e-6
    assert largest_gap(factors(made), factors(make())) > 1e-3


@pytest.mark.parametrize(("batch_size", "accumulation"), [(1, 6), (2, 3), (3, 2)])
def test_accumulation_equals_one_large_batch(make, batch_size, accumulation):
    """Micro-batches with 1 to 8 counted tokens: a mean of means would weigh tokens unequally."""
    examples = EXAMPLES[:6]
    made, whole = make(), make()
    small = PLAIN.model_copy(update={"batch_size": batch_size, "accumulation": accumulation})
    large = PLAIN.model_copy(update={"batch_size": 6})
    left = run(made, replace(WORK, steps=1), small, examples)
    right = run(whole, replace(WORK, steps=1), large, examples)
    assert largest_gap(factors(made), factors(whole)) < 1e-6
    assert (left.loss, left.count) == (pytest.approx(right.loss, abs=1e-6), right.count)


def test_clipping_limits_the_step_and_not_more(make):
    settings = PLAIN.model_copy(update={"batch_size": len(EXAMPLES), "max_grad_norm": 0.1})
    made, reference, start = make(), make(), make()
    run(made, replace(WORK, steps=1), settings)
    _, norm = hand_made_step(reference, EXAMPLES, 0.5, clip=0.1)
    assert norm > 0.1
    assert largest_gap(factors(made), factors(reference)) < 1e-6
    after, before = factors(made), factors(start)
    moved = math.sqrt(sum(float(((after[k] - before[k]) ** 2).sum()) for k in after))
    assert moved == pytest.approx(0.5 * 0.1, rel=1e-4)
    free = make()
    run(free, replace(WORK, steps=1), settings.model_copy(update={"max_grad_norm": 1e6}))
    plain = make()
    run(plain, replace(WORK, steps=1), settings.model_copy(update={"max_grad_norm": 0.0}))
    assert same_bits(factors(free), factors(plain))


def test_the_loss_of_a_padded_batch_is_that_of_its_texts(make):
    made = make()
    with torch.no_grad():
        part = loss_sum(made.model, collate(EXAMPLES, 0), "causal-lm")
        expected = mean_loss(made, EXAMPLES)
    assert float(part.total) / part.count == pytest.approx(float(expected), abs=1e-6)
    assert 0 <= part.correct <= part.count


def test_the_learning_rate_warms_up_and_falls_along_a_cosine():
    settings = TrainingSection(learning_rate=2.0, warmup_steps=4, schedule="cosine")
    rates = [learning_rate(settings, step, 12) for step in range(13)]
    assert rates[:5] == [0.5, 1.0, 1.5, 2.0, 2.0]
    assert rates[8] == pytest.approx(1.0)
    assert rates[6] == pytest.approx(1.0 + math.cos(math.pi / 4))
    assert rates[12] == pytest.approx(0.0)
    assert learning_rate(settings, 99, 12) == pytest.approx(0.0)
    constant = settings.model_copy(update={"schedule": "constant"})
    assert [learning_rate(constant, s, 12) for s in (0, 3, 4, 11)] == [0.5, 2.0, 2.0, 2.0]
    # a run that is shorter than its warm-up
    assert learning_rate(settings, 1, 2) == 1.0


def test_the_schedule_counts_the_steps_of_earlier_rounds(make):
    """Two rounds of one step at rates 0.25 and 0.5 are the first steps of a warm-up of two."""
    settings = PLAIN.model_copy(update={"batch_size": len(EXAMPLES), "warmup_steps": 2})
    made, reference = make(), make()
    for number in range(2):
        run(made, replace(WORK, steps=1, first_step=number, round=number + 1), settings)
    for rate in (0.25, 0.5):
        hand_made_step(reference, EXAMPLES, rate)
    assert largest_gap(factors(made), factors(reference)) < 1e-6


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_moments_continue_where_they_were(make, optimizer, momentum):
    """3 steps + 2 steps with the moments carried over = 5 steps, bit for bit."""
    settings = ADAMW.model_copy(
        update={"optimizer": optimizer, "momentum": momentum, "batch_size": len(EXAMPLES)}
    )
    whole, pieces, forgetful = make(), make(), make()
    run(whole, replace(WORK, steps=5), settings)
    first = run(pieces, replace(WORK, steps=3), settings)
    run(pieces, replace(WORK, steps=2, round=2), settings, moments=first.moments)
    run(forgetful, replace(WORK, steps=3), settings)
    run(forgetful, replace(WORK, steps=2, round=2), settings)
    # every batch is all examples, in another order: the sums differ in their last bits
    assert largest_gap(factors(whole), factors(pieces)) < 1e-5
    has_moments = optimizer == "adamw" or momentum > 0.0
    assert bool(first.moments) == has_moments
    assert (largest_gap(factors(whole), factors(forgetful)) > 1e-4) == has_moments


def test_saved_moments_are_copies_and_loading_them_changes_none(make):
    made = make()
    first = run(made, settings=ADAMW)
    kept = {k: v.clone() for k, v in first.moments.items()}
    run(made, settings=ADAMW, moments=first.moments)
    assert same_bits(dict(first.moments), kept)


def test_moments_of_another_shape_or_factor_are_left_out(make):
    made, fresh = make(), make()
    only_a = run(make(), replace(WORK, factors=("A",)), ADAMW).moments
    assert only_a
    assert all(".A." in name for name in only_a)
    odd = {name: torch.zeros(7, 7) if v.dim() else v for name, v in only_a.items()}
    run(made, settings=ADAMW, moments=odd)
    run(fresh, settings=ADAMW)
    assert same_bits(factors(made), factors(fresh))


def test_moment_names_say_whose_they_are(make):
    parameters = make().train_only(("B",))
    optimizer = make_optimizer(parameters, ADAMW)
    assert optimizer_tensors(optimizer, parameters) == {}
    for parameter in parameters.values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    names = {f"{p}.{m}" for p in parameters for m in ("exp_avg", "exp_avg_sq", "step")}
    assert optimizer_tensors(optimizer, parameters).keys() == names


@pytest.mark.parametrize("factor", ["A", "B"])
def test_a_factor_that_is_not_planned_keeps_every_bit(make, factor):
    made = make()
    before = factors(made)
    run(made, replace(WORK, factors=(factor,)), ADAMW.model_copy(update={"weight_decay": 0.1}))
    for name, value in factors(made).items():
        assert torch.equal(value, before[name]) == (not name.endswith(factor)), name


@pytest.mark.parametrize(
    "method", ["lora", "dora", "pissa", "lora-xs", "vera", "miss", "bone-col", "bone-row"]
)
def test_the_base_keeps_every_bit(make, method):
    made = make(method)
    before = {k: v.clone() for k, v in made.model.state_dict().items()}
    own = set(made.parameters())
    run(made, replace(WORK, factors=("A", "B", "D", "R", "b", "v", "m")), ADAMW)
    trained = {id(p) for p in made.parameters().values()}
    assert own
    for name, parameter in made.model.named_parameters():
        if id(parameter) not in trained:
            assert torch.equal(parameter, before[name])
            assert parameter.grad is None


def test_the_plain_model_is_back_after_detaching(make, base):
    made = make()
    run(made)
    assert fingerprint(made.detach()) == fingerprint(base)


def test_training_draws_nothing_from_the_global_generator(make):
    made = make(dropout=0.3)
    before = torch.get_rng_state()
    run(made, settings=ADAMW.model_copy(update={"gradient_checkpointing": True}))
    assert torch.equal(torch.get_rng_state(), before)


def test_the_state_of_the_global_generator_changes_nothing(make):
    left, right = make(dropout=0.3), make(dropout=0.3)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        run(left)
        torch.manual_seed(2)
        run(right)
    assert same_bits(factors(left), factors(right))


@pytest.mark.parametrize("change", [{"seed": 1}, {"client": "d"}, {"round": 2}])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_data_order_and_dropout_are_named_by_seed_client_and_round(make, change, dropout):
    """With all examples in every batch only the dropout is left to differ."""
    settings = PLAIN if not dropout else PLAIN.model_copy(update={"batch_size": 7})
    left, again, other = (make(dropout=dropout) for _ in range(3))
    run(left, settings=settings)
    run(again, settings=settings)
    run(other, replace(WORK, **change), settings)
    assert same_bits(factors(left), factors(again))
    assert largest_gap(factors(left), factors(other)) > 1e-4


def test_loader_processes_change_no_bit(make):
    alone, helped = make(dropout=0.2), make(dropout=0.2)
    run(alone)
    run(helped, settings=PLAIN.model_copy(update={"num_workers": 1}))
    assert same_bits(factors(alone), factors(helped))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_checkpointing_changes_no_gradient(make, dropout):
    """The recomputed forward pass draws the same dropout mask."""
    plain, saving = make(dropout=dropout), make(dropout=dropout)
    left = run(plain)
    right = run(saving, settings=PLAIN.model_copy(update={"gradient_checkpointing": True}))
    assert largest_gap(factors(plain), factors(saving)) < 1e-6
    assert right.loss == pytest.approx(left.loss, abs=1e-6)
    assert not any(getattr(m, "gradient_checkpointing", False) for m in saving.model.modules())


def test_dropout_is_on_in_training_only(make):
    made, plain = make(dropout=0.5), make()
    run(made)
    run(plain)
    assert largest_gap(factors(made), factors(plain)) > 1e-3
    assert not made.model.training
    with torch.no_grad():
        assert torch.equal(mean_loss(made, EXAMPLES), mean_loss(made, EXAMPLES))


def test_bf16_autocast_stays_close_to_float32(make):
    low, high = make(), make()
    settings = ADAMW.model_copy(update={"precision": "bf16"})
    left, right = run(low, settings=settings), run(high, settings=ADAMW)
    assert left.loss == pytest.approx(right.loss, rel=0.02)
    assert not same_bits(factors(low), factors(high))
    assert all(v.dtype == torch.float32 for v in factors(low).values())


def test_a_bfloat16_base_trains_float32_factors(make):
    made = make(dtype=torch.bfloat16)
    before = factors(made)
    result = run(made, settings=ADAMW)
    assert math.isfinite(result.loss)
    assert all(v.dtype == torch.float32 for v in factors(made).values())
    assert largest_gap(factors(made), before) > 1e-3


def test_no_steps_change_nothing(make):
    made = make()
    before = factors(made)
    result = run(made, replace(WORK, steps=0), ADAMW)
    assert (result.loss, result.count, dict(result.moments)) == (None, 0, {})
    assert same_bits(factors(made), before)


def test_a_loss_that_is_not_finite_is_an_error_that_names_the_client(make):
    made = make()
    with torch.no_grad():
        next(iter(made.parameters().values())).fill_(math.nan)
    with pytest.raises(TrainingError, match="client c: the loss is nan at step 1 of round 1"):
        run(made)
    assert not made.model.training


def test_a_client_with_fewer_examples_than_a_batch_trains_on_all_of_them(make):
    made, reference = make(), make()
    run(made, replace(WORK, steps=1), PLAIN.model_copy(update={"batch_size": 64}))
    hand_made_step(reference, EXAMPLES, 0.5)
    assert largest_gap(factors(made), factors(reference)) < 1e-6


def test_examples_without_a_counted_token_change_nothing(make):
    made = make()
    before = factors(made)
    result = run(made, examples=texts([4, 5], counted=[0, 0]))
    assert (result.loss, result.count) == (None, 0)
    assert same_bits(factors(made), before)
