"""Training several clients at once against training them one by one."""

import copy
from dataclasses import replace

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from fedlora.adapter import AdapterState
from fedlora.adapters.inject import adapt
from fedlora.adapters.stacked import obstacle
from fedlora.config.job import ModelSection, TrainingSection
from fedlora.data.example import IGNORE, Example
from fedlora.errors import TrainingError
from fedlora.models.loading import load_base
from fedlora.training.cohort import Cohort
from fedlora.training.terms import Correction, Freeze, Proximal, TailPenalty
from fedlora.training.trainer import LocalWork, Training, train

METHODS = ["lora", "rslora", "pissa", "vera", "miss", "lora-xs", "bone-row", "dora"]
ADAMW = TrainingSection(
    batch_size=3, optimizer="adamw", learning_rate=1e-2, max_grad_norm=0.5, local_steps=3
)
SGD = ADAMW.model_copy(update={"optimizer": "sgd", "momentum": 0.9, "weight_decay": 0.01})


def texts(lengths, seed):
    draws = torch.Generator().manual_seed(seed)
    found = []
    for length in lengths:
        ids = torch.randint(3, 16, (length,), generator=draws)
        target = ids.clone()
        target[: int(torch.randint(1, length, (), generator=draws))] = IGNORE
        found.append(Example({"input_ids": ids}, target))
    return found


# of different lengths, and the last client has fewer than a batch
DATA = [texts([9, 3, 6, 4, 8], 0), texts([5, 5, 5, 5], 1), texts([12, 2, 7], 2), texts([4, 6], 3)]


@pytest.fixture(scope="module")
def llama(tiny_folder):
    section = ModelSection(name=str(tiny_folder), task="causal-lm")
    return load_base(section, labels=(), pad_id=0, seed=0).model


@pytest.fixture(scope="module")
def bert():
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=16,
        hidden_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=16,
        num_labels=3,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return BertForSequenceClassification(config).eval()


def adapted(base, method="lora", dtype=torch.float64, dropout=0.0, heads=(), targets=None):
    return adapt(
        copy.deepcopy(base).to(dtype),
        method=method,
        rank=2,
        alpha=None,
        targets=targets or ["q_proj", "down_proj"],
        heads=heads,
        base_fingerprint="",
        seed=0,
        dropout=dropout,
    )


def starts(made, clients):
    """An adapter of its own for every client."""
    found = []
    for client in range(clients):
        draws = torch.Generator().manual_seed(client)
        tensors = {
            name: value + 0.3 * torch.randn(value.shape, generator=draws, dtype=value.dtype)
            for name, value in made.state().tensors.items()
        }
        found.append(AdapterState(made.spec, tensors))
    return found


def trainings(made, factors=None, steps=(3, 1, 3, 2), data=DATA, **more):
    if factors is None:
        factors = tuple(next(iter(made.layers.values())).factors())
    return [
        Training(
            start,
            {},
            examples,
            LocalWork(factors, count, 3, 9, seed=5, client=f"c{place}", round=2, **more),
            {},
        )
        for place, (start, examples, count) in enumerate(
            zip(starts(made, len(data)), data, steps, strict=True)
        )
    ]


def one_by_one(made, given, settings, task="causal-lm"):
    found = []
    for training in given:
        training.put(made)
        found.append(
            train(
                made,
                training.examples,
                training.work,
                settings,
                task=task,
                pad_id=0,
                moments=training.moments,
            )
        )
    return found


def together(made, given, settings, task="causal-lm", width=8):
    return Cohort(made, given, settings, task=task, pad_id=0, width=width).train()


def assert_equal(left, right, tolerance):
    """Every result of `left` is that of `right`, relative to the size of each tensor."""
    assert len(left) == len(right)
    for mine, other in zip(left, right, strict=True):
        assert mine.count == other.count
        assert mine.loss == pytest.approx(other.loss, rel=tolerance)
        assert mine.rate_sum == pytest.approx(other.rate_sum)
        for found, expected in ((mine.trained, other.trained), (mine.moments, other.moments)):
            assert found.keys() == expected.keys()
            for name, value in expected.items():
                gap = float((found[name] - value).norm())
                assert gap <= tolerance * float(value.norm()) + 1e-300, name


@pytest.mark.parametrize("settings", [ADAMW, SGD], ids=["adamw", "sgd"])
@pytest.mark.parametrize("method", METHODS)
def test_a_cohort_trains_every_client_as_if_it_were_alone(llama, method, settings):
    made = adapted(llama, method)
    given = trainings(made)
    expected = one_by_one(made, given, settings)
    assert_equal(together(made, given, settings), expected, 1e-12)
    # and leaves the model as it was
    assert_equal(one_by_one(made, given, settings), expected, 0.0)


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_in_single_precision_too(llama, method):
    made = adapted(llama, method, torch.float32)
    given = trainings(made)
    assert_equal(together(made, given, ADAMW), one_by_one(made, given, ADAMW), 1e-5)


@pytest.mark.parametrize(
    "change",
    [
        {"accumulation": 3},
        {"gradient_checkpointing": True},
        {"schedule": "cosine", "warmup_steps": 5},
        {"max_grad_norm": 0.0},
    ],
    ids=str,
)
def test_whatever_the_settings(llama, change):
    made = adapted(llama)
    settings = ADAMW.model_copy(update=change)
    given = trainings(made)
    assert_equal(together(made, given, settings), one_by_one(made, given, settings), 1e-12)


@pytest.mark.parametrize("targets", [None, "all-linear"], ids=["apart", "siblings"])
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_dropout_has_every_clients_own_masks(llama, method, targets):
    made = adapted(llama, method, dropout=0.5, targets=targets)
    given = trainings(made)
    expected = one_by_one(made, given, ADAMW)
    assert_equal(together(made, given, ADAMW), expected, 1e-12)
    without = adapted(llama, method, targets=targets)
    assert one_by_one(without, given, ADAMW)[0].loss != pytest.approx(expected[0].loss, rel=1e-3)


def test_moments_of_earlier_rounds_are_gone_on_with(llama):
    """RoLoRA's way: a factor that was not trained before starts afresh beside one that was."""
    made = adapted(llama)
    earlier = one_by_one(made, trainings(made, ("A",)), ADAMW)
    given = [
        replace(training, moments=result.moments if place else {})
        for place, (training, result) in enumerate(zip(trainings(made), earlier, strict=True))
    ]
    assert_equal(together(made, given, ADAMW), one_by_one(made, given, ADAMW), 1e-12)


@pytest.mark.parametrize("factors", [("A", "B"), ("B",)], ids=str)
def test_linears_of_one_input(llama, factors):
    """Frozen factors are the same for all clients, and held once."""
    made = adapted(llama, targets="all-linear")
    given = [
        replace(training, start=trainings(made, factors)[0].start)
        if factors == ("B",)
        else training
        for training in trainings(made, factors)
    ]
    assert_equal(together(made, given, ADAMW), one_by_one(made, given, ADAMW), 1e-12)


def test_a_frozen_factor_may_differ_between_clients(llama):
    made = adapted(llama)
    given = trainings(made, ("B",))
    found = together(made, given, ADAMW)
    assert_equal(found, one_by_one(made, given, ADAMW), 1e-12)
    name = f"{made.spec.layers[0].name}.A"
    assert torch.equal(found[1].trained[name], given[1].start.tensors[name])


def test_factors_may_have_rates_of_their_own(llama):
    made = adapted(llama)
    given = trainings(made, rates={"B": 4.0})
    assert_equal(together(made, given, ADAMW), one_by_one(made, given, ADAMW), 1e-12)


def test_every_client_keeps_its_own_terms(llama):
    made = adapted(llama)
    given = trainings(made)
    layers, anchor = made.spec.layers, starts(made, 4)[3].tensors
    name = f"{layers[0].name}.B"
    mask = torch.zeros_like(anchor[name])
    mask[:, 0] = 1.0
    terms = [
        (Proximal(0.5, anchor),),
        (),
        (Correction({name: anchor[name]}), TailPenalty(0.1, 1, layers)),
        (Freeze({name: mask}, given[3].start.tensors),),
    ]
    given = [
        replace(training, work=replace(training.work, terms=own))
        for training, own in zip(given, terms, strict=True)
    ]
    found = together(made, given, ADAMW)
    assert_equal(found, one_by_one(made, given, ADAMW), 1e-12)
    start = given[3].start.tensors[name]
    assert torch.equal(found[3].trained[name][:, 1:], start[:, 1:])


def test_a_layer_that_the_model_does_not_use_stays_as_it_is(llama):
    """Without a gradient there is no weight decay either."""
    made = adapted(llama)
    idle = made.layers[made.spec.layers[0].name]
    idle.forward = idle.base.forward
    given = trainings(made)
    found = together(made, given, ADAMW)
    assert_equal(found, one_by_one(made, given, ADAMW), 1e-12)
    name = f"{made.spec.layers[0].name}.A"
    assert torch.equal(found[0].trained[name], given[0].start.tensors[name])


def test_a_frozen_change_of_the_base_is_everybodys(llama):
    made = adapted(llama)
    draws = torch.Generator().manual_seed(0)
    fold = {}
    for layer in made.spec.layers:
        fold[f"{layer.name}.L"] = torch.randn(layer.out, 1, generator=draws, dtype=torch.float64)
        fold[f"{layer.name}.Q"] = torch.randn(1, layer.inp, generator=draws, dtype=torch.float64)
    plain = trainings(made)
    given = [replace(training, fold={"1": fold}) for training in plain]
    expected = one_by_one(made, given, ADAMW)
    assert_equal(together(made, given, ADAMW), expected, 1e-12)
    assert one_by_one(made, plain, ADAMW)[0].loss != pytest.approx(expected[0].loss, rel=1e-3)


def classes(sizes, seed):
    return [
        Example({"input_ids": example.inputs["input_ids"]}, torch.tensor(place % 3))
        for place, example in enumerate(texts(sizes, seed))
    ]


@pytest.mark.parametrize("method", ["lora", "vera"])
def test_heads_are_every_clients_own(bert, method):
    made = adapted(bert, method, heads=("classifier",), targets=["query", "value"])
    data = [classes([9, 3, 6, 4, 8], 0), classes([5, 5], 1), classes([12, 2, 7], 2)]
    given = trainings(made, steps=(3, 2, 1), data=data)
    task = "sequence-classification"
    found = together(made, given, ADAMW, task)
    assert_equal(found, one_by_one(made, given, ADAMW, task), 1e-12)
    assert {"classifier.weight", "classifier.bias"} <= found[0].moments.keys() | found[
        0
    ].trained.keys()


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("room", [1, 2, 3])
def test_a_cohort_that_does_not_fit_is_halved_within_the_step(llama, room, accumulation):
    """Memory runs out in the backward pass, when some gradients are there already."""
    made = adapted(llama)
    settings = ADAMW.model_copy(update={"accumulation": accumulation})
    given = trainings(made)
    expected = one_by_one(made, given, settings)
    first = made.model.get_submodule("model.layers.0")
    refused = []

    def refuse(module, inputs, output):
        rows = output[0] if isinstance(output, tuple) else output
        if len(rows) > 3 * room and rows.requires_grad:

            def fail(gradient):
                refused.append(len(gradient))
                raise RuntimeError("CPU: can't allocate memory: you tried to allocate")

            rows.register_hook(fail)

    handle = first.register_forward_hook(refuse)
    try:
        found = together(made, given, settings)
    finally:
        handle.remove()
    assert refused
    assert_equal(found, expected, 1e-12)


def test_another_error_is_not_taken_for_a_lack_of_memory(llama):
    made = adapted(llama)

    def fail(module, inputs):
        raise RuntimeError("shapes do not fit")

    handle = made.model.register_forward_pre_hook(fail)
    try:
        with pytest.raises(RuntimeError, match="shapes do not fit"):
            together(made, trainings(made), ADAMW)
    finally:
        handle.remove()


def test_a_client_that_diverges_is_the_only_one(llama):
    made = adapted(llama)
    given = trainings(made)
    broken = {name: value * float("nan") for name, value in given[1].start.tensors.items()}
    given[1] = replace(given[1], start=AdapterState(made.spec, broken))
    found = together(made, given, ADAMW)
    assert isinstance(found[1], TrainingError)
    with pytest.raises(TrainingError, match="client c1: the loss is nan at step 1 of round 2"):
        raise found[1]
    others = [given[place] for place in (0, 2, 3)]
    assert_equal([found[0], *found[2:]], one_by_one(made, others, ADAMW), 1e-12)


def test_a_method_with_a_matrix_per_client_is_told_apart(llama, bert):
    assert "bone-col" in obstacle(adapted(llama, "bone-col"))
    assert not obstacle(adapted(llama))
    assert "not a linear layer" in obstacle(
        adapted(bert, heads=("bert.encoder.layer.1",), targets=["0.attention.self.query"])
    )
