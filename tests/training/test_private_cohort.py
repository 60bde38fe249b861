"""Private training of several clients at once against training them one by one.

Noise and batches are drawn from known seeds, so that both ways draw the same.
"""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from fedlora.adapter import AdapterState
from fedlora.adapters import METHODS
from fedlora.adapters.stacked import StackedModel, obstacle
from fedlora.config.job import TrainingSection
from fedlora.data.example import Example, collate
from fedlora.errors import TrainingError
from fedlora.privacy.mechanism import Mechanism
from fedlora.privacy.noise import TestNoise
from fedlora.privacy.pieces import Outer, Whole, clipped_client_sums, clipped_sum
from fedlora.privacy.sampling import seeded_uniform
from fedlora.privacy.stacked_taps import StackedTaps
from fedlora.training.cohort import join
from fedlora.training.loss import example_losses
from fedlora.training.mode import training_mode
from fedlora.training.private import train_private
from fedlora.training.private_cohort import PrivateCohort
from fedlora.training.terms import Correction, Proximal
from fedlora.training.trainer import LocalWork, Training
from tests.privacy.models import KINDS, examples, make

torch.set_num_threads(1)

ADAMW = TrainingSection(batch_size=2, optimizer="adamw", learning_rate=1e-2, local_steps=3)
# of different sizes; the last client's batches are mostly empty
LENGTHS = [(9, 3, 6, 4, 8), (5, 5, 5, 5), (12, 2, 7), (4, 6)]
RATES = (0.9, 0.6, 0.7, 0.2)
CLIPS = (0.5, 50.0, 0.05, 0.5)
STEPS = (3, 1, 3, 2)
TOGETHER = [method for method in METHODS if method != "bone-col"]
# one method for each kind of leaf
LEAVES = ("lora", "vera", "bone-row")
PAIRS = [("llama", method) for method in TOGETHER] + [
    (kind, method) for kind in KINDS[1:] for method in LEAVES
]


def mechanism(client, **changes):
    """A client's, with its streams at their beginning."""
    made = Mechanism(
        examples=len(LENGTHS[client]),
        rate=RATES[client],
        clip=CLIPS[client],
        noise_multiplier=0.3 + client,
        source=TestNoise(5, client),
        uniform=seeded_uniform(5, client),
    )
    return replace(made, **changes)


def data(kind, client, dtype):
    found = examples(kind, LENGTHS[client])
    if kind != "vit":
        return found
    scale = 1.0 + client
    return [
        Example({"pixel_values": scale * e.inputs["pixel_values"].to(dtype)}, e.target)
        for e in found
    ]


def trainings(made, kind="llama", factors=None, dtype=torch.float64, mechanisms=None, **more):
    """Of four clients; a second call has the same noise and the same batches again."""
    if factors is None:
        factors = tuple({f for layer in made.layers.values() for f in layer.factors()})
    found = []
    for client, steps in enumerate(STEPS):
        draws = torch.Generator().manual_seed(client)
        tensors = {
            # the magnitudes of DoRA are about 1
            name: name.endswith(".m")
            + 0.3 * torch.randn(value.shape, generator=draws, dtype=value.dtype)
            for name, value in made.state().tensors.items()
        }
        work = LocalWork(factors, steps, 3, 9, seed=5, client=f"c{client}", round=2, **more)
        found.append(
            Training(
                AdapterState(made.spec, tensors),
                {},
                data(kind, client, dtype),
                work,
                {},
                mechanisms[client] if mechanisms else mechanism(client),
            )
        )
    return found


def one_by_one(made, given, settings=ADAMW, task="causal-lm"):
    return [train_private(made, t, settings, task=task, pad_id=0) for t in given]


def together(made, given, settings=ADAMW, task="causal-lm", width=8):
    return PrivateCohort(made, given, settings, task=task, pad_id=0, width=width).train()


def assert_equal(left, right, tolerance=1e-12):
    """Every result of `left` is that of `right`, relative to the size of each tensor."""
    assert len(left) == len(right)
    for mine, other in zip(left, right, strict=True):
        assert (mine.loss, mine.count) == (other.loss, other.count) == (None, 0)
        assert mine.rate_sum == pytest.approx(other.rate_sum)
        for found, expected in ((mine.trained, other.trained), (mine.moments, other.moments)):
            assert found.keys() == expected.keys()
            for name, value in expected.items():
                gap = float((found[name] - value).norm())
                assert gap <= tolerance * float(value.norm()) + 1e-300, name


def check(made, build, settings=ADAMW, task="causal-lm", tolerance=1e-12, width=8):
    """Compares both ways, of what `build` makes anew for each."""
    expected = one_by_one(made, build(), settings, task)
    found = together(made, build(), settings, task, width)
    assert_equal(found, expected, tolerance)
    return found


def test_batches_are_empty_larger_than_a_pass_and_of_different_sizes():
    """What the comparisons below are about; by the streams that they draw from."""
    sizes = [[len(m.batch()) for _ in range(3)] for m in map(mechanism, range(4))]
    assert 0 in sizes[3]
    assert max(sizes[0]) > 2 * ADAMW.batch_size
    assert len({row[0] for row in sizes}) > 2


@pytest.mark.parametrize(("kind", "method"), PAIRS)
def test_a_cohort_trains_every_client_as_if_it_were_alone(kind, method):
    made = make(kind, method, dtype=torch.float64)
    adapted = made.adapted
    assert not obstacle(adapted)
    check(adapted, lambda: trainings(adapted, kind), task=made.task)


@pytest.mark.parametrize("method", [*LEAVES, "dora"])
def test_in_single_precision_too(method):
    made = make("llama", method).adapted
    check(made, lambda: trainings(made, dtype=torch.float32), tolerance=1e-5)


@pytest.mark.parametrize(
    "change",
    [
        {"gradient_checkpointing": True},
        {"schedule": "cosine", "warmup_steps": 5},
        {"batch_size": 1},
        {"batch_size": 16},
        {"optimizer": "sgd", "momentum": 0.9, "weight_decay": 0.01},
        # of plain training
        {"max_grad_norm": 1e-3, "accumulation": 2},
    ],
    ids=str,
)
def test_whatever_the_settings(change):
    made = make(dtype=torch.float64).adapted
    check(made, lambda: trainings(made), ADAMW.model_copy(update=change))


@pytest.mark.parametrize("width", [1, 3])
def test_whatever_the_width(width):
    made = make(dtype=torch.float64).adapted
    check(made, lambda: trainings(made), width=width)


def test_only_some_factors_which_may_have_rates_of_their_own():
    made = make(dtype=torch.float64).adapted
    found = check(made, lambda: trainings(made, factors=("B",), rates={"B": 4.0}))
    starts = trainings(made)
    name = f"{made.spec.layers[0].name}.A"
    for result, training in zip(found, starts, strict=True):
        assert torch.equal(result.trained[name], training.start.tensors[name])


def test_moments_of_earlier_rounds_are_gone_on_with():
    made = make(dtype=torch.float64).adapted
    earlier = one_by_one(made, trainings(made, factors=("A",)))
    check(
        made,
        lambda: [
            replace(training, moments=result.moments if place else {})
            for place, (training, result) in enumerate(zip(trainings(made), earlier, strict=True))
        ],
    )


def test_every_client_keeps_its_own_terms_after_the_noise():
    made = make(dtype=torch.float64).adapted
    anchor = trainings(made)[3].start.tensors
    name = f"{made.spec.layers[0].name}.B"
    terms = [(Proximal(0.5, anchor),), (), (Correction({name: anchor[name]}),), ()]

    def build():
        return [
            replace(training, work=replace(training.work, terms=own))
            for training, own in zip(trainings(made), terms, strict=True)
        ]

    check(made, build)


def test_a_frozen_change_of_the_base_is_everybodys():
    made = make(dtype=torch.float64).adapted
    draws = torch.Generator().manual_seed(0)
    fold = {}
    for layer in made.spec.layers:
        fold[f"{layer.name}.L"] = torch.randn(layer.out, 1, generator=draws, dtype=torch.float64)
        fold[f"{layer.name}.Q"] = torch.randn(1, layer.inp, generator=draws, dtype=torch.float64)
    check(made, lambda: [replace(training, fold={"1": fold}) for training in trainings(made)])


def test_what_one_client_holds_is_nothing_to_another():
    """Neither its examples and noise nor a value that is not finite."""
    made = make(dtype=torch.float64).adapted
    other = trainings(made)
    plain = together(made, trainings(made))
    broken = {name: value * float("nan") for name, value in other[1].start.tensors.items()}
    other[1] = replace(other[1], start=AdapterState(made.spec, broken))
    found = together(made, other)
    assert_equal([found[i] for i in (0, 2, 3)], [plain[i] for i in (0, 2, 3)], 1e-12)
    assert all(bool(value.isnan().all()) for value in found[1].trained.values())


def test_an_example_that_is_not_finite_adds_nothing():
    made = make("vit", dtype=torch.float64)

    def build():
        given = trainings(made.adapted, "vit")
        first, *rest = given[0].examples
        bad = Example({"pixel_values": first.inputs["pixel_values"] * math.inf}, first.target)
        # all of the first client's, in every step
        always = mechanism(0, uniform=lambda count: torch.zeros(count).numpy())
        return [replace(given[0], examples=[bad, *rest], mechanism=always), *given[1:]]

    found = check(made.adapted, build, task=made.task)
    assert all(bool(value.isfinite().all()) for value in found[0].trained.values())


class Counted:
    """A source that keeps the shapes it was asked for."""

    mode = "test"

    def __init__(self, source):
        self.source = source
        self.shapes = []

    def normal(self, shape, device="cpu"):
        self.shapes.append(tuple(shape))
        return self.source.normal(shape, device)


@pytest.mark.parametrize("room", [1, 2, 5])
@pytest.mark.parametrize("late", [False, True])
def test_memory_that_runs_out_changes_nothing(room, late):
    """Clients are parted first, then the examples of one; noise is drawn once per step."""
    made = make(dtype=torch.float64).adapted
    settings = ADAMW.model_copy(update={"batch_size": 4})
    expected = one_by_one(made, trainings(made), settings)
    refused = []

    def refuse(module, inputs, output):
        rows = output[0] if isinstance(output, tuple) else output
        if len(rows) <= room:
            return

        def fail(*_):
            refused.append(len(rows))
            raise RuntimeError("CPU: can't allocate memory: you tried to allocate")

        if not late:
            fail()
        elif rows.requires_grad:
            rows.register_hook(fail)

    sources = [Counted(mechanism(client).source) for client in range(4)]
    given = trainings(
        made, mechanisms=[mechanism(i, source=source) for i, source in enumerate(sources)]
    )
    handle = made.model.get_submodule("model.layers.0").register_forward_hook(refuse)
    try:
        found = PrivateCohort(made, given, settings, task="causal-lm", pad_id=0, width=8).train()
    finally:
        handle.remove()
    assert refused
    assert_equal(found, expected)
    tensors = len(made.train_only(given[0].work.factors))
    assert [len(source.shapes) for source in sources] == [steps * tensors for steps in STEPS]


def test_another_error_is_not_taken_for_a_lack_of_memory():
    made = make(dtype=torch.float64).adapted
    together(made, trainings(made))

    def fail(module, inputs):
        raise RuntimeError("shapes do not fit")

    handle = made.model.register_forward_pre_hook(fail)
    try:
        with pytest.raises(RuntimeError, match="shapes do not fit"):
            together(made, trainings(made))
    finally:
        handle.remove()
    # and nothing of it stays behind
    check(made, lambda: trainings(made))


@pytest.mark.parametrize(
    ("kind", "method"),
    [*(("llama", method) for method in LEAVES), *((kind, "lora") for kind in KINDS[1:])],
)
def test_rows_hold_the_gradients_of_examples_alone_and_padding_none(kind, method):
    """Oracle: autograd on each example alone, unpadded, with its client's own values."""
    made = make(kind, method, dtype=torch.float64)
    adapted = made.adapted
    given = trainings(adapted, kind)
    rows = [t.examples[: 3 - place] for place, t in enumerate(given[:3])]
    parameters = adapted.train_only(given[0].work.factors)
    expected = {name: [] for name in parameters}
    for own, training in zip(rows, given, strict=False):
        adapted.load(training.start.tensors)
        for example in own:
            loss = example_losses(adapted.model, collate([example], 0), made.task).sum()
            grads = torch.autograd.grad(loss, list(parameters.values()))
            for name, grad in zip(parameters, grads, strict=True):
                expected[name].append(grad)
        for name in parameters:
            missing = 3 - len(own)
            expected[name] += [torch.zeros_like(parameters[name])] * missing
    values = {
        name: torch.stack([t.start.tensors[name] for t in given[:3]]).to(parameters[name])
        for name in parameters
    }
    batch = join([collate(own, 0) for own in rows], 0)
    stacked = StackedModel(adapted, parameters)
    with (
        training_mode(adapted, checkpointing=False),
        stacked,
        StackedTaps(stacked, parameters, torch.device("cpu")) as taps,
    ):
        stacked.hold(values)
        taps.begin(9)
        example_losses(adapted.model, batch, made.task).sum().backward()
        pieces = taps.pieces()
    for name, grads in expected.items():
        torch.testing.assert_close(pieces[name].whole(), torch.stack(grads), rtol=1e-9, atol=1e-12)
        norms = pieces[name].squared_norms().view(3, 3)
        assert [int((row != 0).sum()) for row in norms] == [3, 2, 1], name


def pieces_of(seed, bad=None):
    """One piece of each kind, of 3 clients with 4 examples each."""
    draws = torch.Generator().manual_seed(seed)
    x, g = (torch.randn(12, 3, f, generator=draws, dtype=torch.float64) for f in (5, 4))
    whole = torch.randn(12, 2, 3, generator=draws, dtype=torch.float64)
    if bad is not None:
        whole[bad] = math.nan
    return {"outer": Outer(x, g), "whole": Whole(whole)}


@pytest.mark.parametrize("bad", [None, 6])
def test_clipped_sums_of_clients_are_those_of_each_alone(bad):
    pieces = pieces_of(0, bad)
    clips = (1.0, 3.0, 100.0)
    found = clipped_client_sums(pieces, clips)
    for client, clip in enumerate(clips):
        rows = slice(4 * client, 4 * client + 4)
        alone = {
            "outer": Outer(pieces["outer"].x[rows], pieces["outer"].g[rows]),
            "whole": Whole(pieces["whole"].grads[rows]),
        }
        for name, value in clipped_sum(alone, clip)[0].items():
            torch.testing.assert_close(found[name][client], value, rtol=1e-12, atol=1e-14)


# what voids the promise


def test_dropout_is_refused():
    made = make(dropout=0.5, dtype=torch.float64).adapted
    with pytest.raises(TrainingError, match="the adapter has dropout"):
        together(made, trainings(made))


class Mixing(nn.Module):
    """Takes the mean over the batch out of every activation."""

    def forward(self, x):
        return x - x.mean(0, keepdim=True)


def test_a_model_that_mixes_examples_is_refused():
    made = make(dtype=torch.float64).adapted
    made.model.model.norm = nn.Sequential(made.model.model.norm, Mixing())
    with pytest.raises(TrainingError, match="changes with the other examples"):
        together(made, trainings(made))


def test_a_layer_that_the_model_does_not_use_is_refused():
    """Noise alone would move it."""
    made = make(dtype=torch.float64).adapted
    together(made, trainings(made))
    idle = made.layers[made.spec.layers[0].name]
    idle.forward = idle.base.forward
    with pytest.raises(TrainingError, match="the loss does not reach"):
        together(made, trainings(made))
