"""One client's local training: a plain loop over optimiser steps."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from fedlora.adapter import AdapterState, Tensors
from fedlora.adapters.inject import AdaptedModel
from fedlora.config.job import TrainingSection
from fedlora.data.example import Example
from fedlora.data.order import batch_order, example_lengths, loader
from fedlora.errors import TrainingError
from fedlora.privacy.mechanism import Mechanism
from fedlora.seeds import derive_seed, generator
from fedlora.training.compiled import compiled_layers
from fedlora.training.loss import loss_sum
from fedlora.training.mode import training_mode
from fedlora.training.optimizer import (
    learning_rate,
    make_optimizer,
    optimizer_tensors,
    restore_optimizer,
)
from fedlora.training.terms import Term

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class LocalWork:
    """What to train, and the names that its random streams derive from.

    Attributes:
        factors: factors that are trained; heads always are.
        steps: optimiser steps.
        first_step: optimiser steps of earlier rounds, for the schedule.
        total_steps: optimiser steps of the whole run, likewise.
        seed, client, round: name the streams of data order and dropout.
        stream: further name of the stream of data order.
        rates: factor -> multiplier of the learning rate.
        terms: what the federation adds to the client's own gradient.
        progress: called before each step with the steps done and planned; what it raises ends
            the training.
    """

    factors: tuple[str, ...]
    steps: int
    first_step: int
    total_steps: int
    seed: int
    client: str
    round: int
    stream: str = "data"
    rates: Mapping[str, float] = field(default_factory=dict)
    terms: Sequence[Term] = ()
    progress: Progress | None = None

    def dropout_key(self, step: int, index: int) -> int:
        """Key of the adapter's dropout in a micro-batch of a step."""
        return derive_seed(self.seed, "dropout", self.client, self.round, step, index)


@dataclass(frozen=True)
class LocalResult:
    """What training left behind.

    Attributes:
        loss: mean loss in nats over all tokens (or examples) seen; None without a step.
        count: tokens (or examples) seen.
        rate_sum: sum of the steps' learning rates, multipliers apart.
        trained: every factor and head after the last step, on the CPU.
        moments: the optimiser's state by name.
    """

    loss: float | None
    count: int
    rate_sum: float
    trained: Tensors
    moments: Tensors = field(default_factory=dict)


@dataclass(frozen=True)
class Training:
    """One client's training, to be done by whoever has the model.

    Attributes:
        start: the adapter to begin with.
        fold: versions of frozen changes of the base, see `AdaptedModel.fold`.
        examples: at least one.
        work: how much, and its random streams.
        moments: optimiser state to continue from.
        mechanism: if what is trained is to be private to each example, what makes it so.
    """

    start: AdapterState
    fold: Mapping[str, Tensors]
    examples: Sequence[Example]
    work: LocalWork
    moments: Tensors
    mechanism: Mechanism | None = None

    def put(self, adapted: AdaptedModel) -> None:
        """Makes a model of the same base the one to begin with."""
        adapted.rerank(self.start.spec)
        adapted.load(self.start.tensors)
        adapted.fold(self.fold.values())


def train(
    adapted: AdaptedModel,
    examples: Sequence[Example],
    work: LocalWork,
    settings: TrainingSection,
    *,
    task: str,
    pad_id: int,
    moments: Tensors | None = None,
) -> LocalResult:
    """Trains the adapter in place.

    The gradient of a step is that of the mean loss over all tokens of its micro-batches.

    Args:
        examples: at least one.
        task: the model's task.
        pad_id: padding token.
        moments: optimiser state to continue from.

    Raises:
        TrainingError: the loss is not finite.
    """
    model = adapted.model
    device = next(model.parameters()).device
    parameters = adapted.train_only(work.factors)
    optimizer = make_optimizer(parameters, settings, work.rates)
    restore_optimizer(optimizer, parameters, moments or {})
    order = batch_order(
        len(examples),
        settings.batch_size,
        work.steps * settings.accumulation,
        generator(work.seed, work.stream, work.client, work.round),
        example_lengths(examples) if settings.length_bucketed else None,
    )
    batches = loader(examples, order, pad_id, settings.num_workers)
    loss, count, rate_sum = 0.0, 0, 0.0
    with (
        training_mode(adapted, checkpointing=settings.gradient_checkpointing),
        compiled_layers(adapted, on=settings.compile),
    ):
        for step in range(work.steps):
            if work.progress is not None:
                work.progress(step, work.steps)
            micro = [next(batches) for _ in range(settings.accumulation)]
            step_count = 0
            for index, batch in enumerate(micro):
                adapted.key_dropout(work.dropout_key(step, index))
                with torch.autocast(
                    device.type, torch.bfloat16, enabled=settings.precision == "bf16"
                ):
                    part = loss_sum(model, batch.to(device), task)
                part.total.backward()  # type: ignore[no-untyped-call]
                loss += float(part.total.detach())
                step_count += part.count
            if not math.isfinite(loss):
                raise diverged(work, step, loss)
            count += step_count
            rate_sum += _step(optimizer, parameters, settings, work, step, step_count)
    return LocalResult(
        loss / count if count else None,
        count,
        rate_sum,
        adapted.state().tensors,
        optimizer_tensors(optimizer, parameters),
    )


def diverged(work: LocalWork, step: int, loss: float) -> TrainingError:
    """The error of a loss that is not finite after step `step` (0-based)."""
    return TrainingError(
        f"client {work.client}: the loss is {loss} at step {step + 1} of round {work.round}; "
        "lower training.learning_rate or set training.max_grad_norm"
    )


def _step(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, torch.nn.Parameter],
    settings: TrainingSection,
    work: LocalWork,
    step: int,
    count: int,
) -> float:
    """Moves the parameters and says at what learning rate."""
    for parameter in parameters.values():
        if parameter.grad is not None:
            parameter.grad.div_(max(1, count))
    for term in work.terms:
        term.edit_gradients(parameters)
    if settings.max_grad_norm:
        torch.nn.utils.clip_grad_norm_(parameters.values(), settings.max_grad_norm)
    return move(optimizer, parameters, settings, work, step)


def move(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, torch.nn.Parameter],
    settings: TrainingSection,
    work: LocalWork,
    step: int,
) -> float:
    """One step of the optimiser with the gradients as they are; says at what learning rate."""
    rate = learning_rate(settings, work.first_step + step, work.total_steps)
    for group in optimizer.param_groups:
        group["lr"] = rate * group["multiplier"]
    optimizer.step()
    for term in work.terms:
        term.after_step(parameters)
    optimizer.zero_grad()
    return rate
