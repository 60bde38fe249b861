"""One client's local training by DP-SGD: what it leaves is private to each of its examples.

Opacus' own loop, loader and optimiser are not used: its loader takes one size of batch for
another and cannot make empty batches of dictionaries, transformers cannot run an empty batch,
and its optimiser divides by a rounded batch size (which may be zero).
"""

from collections.abc import Mapping, Sequence
from weakref import WeakSet

import torch
from torch import Tensor, nn

from fedlora.adapters.inject import AdaptedModel
from fedlora.config.job import TrainingSection
from fedlora.data.example import Batch, Example, collate
from fedlora.errors import TrainingError
from fedlora.privacy.made_up import made_up
from fedlora.privacy.mechanism import Mechanism
from fedlora.privacy.per_sample import PerSample, per_sample
from fedlora.training.loss import example_losses
from fedlora.training.memory import in_halves
from fedlora.training.mode import training_mode
from fedlora.training.optimizer import make_optimizer, optimizer_tensors, restore_optimizer
from fedlora.training.trainer import LocalResult, LocalWork, Training, move

# models whose examples were seen not to depend on each other
_ADDITIVE: "WeakSet[nn.Module]" = WeakSet()


class PrivateTrainer:
    """Trains an adapter so that only noisy gradients reach it.

    Args:
        adapted: the model; trained in place.
        examples: the client's, at least one.
        mechanism: clips, noises and takes batches.
        task: the model's task.
        pad_id: padding token.

    Raises:
        TrainingError: the adapter has dropout. Its masks depend on an example's place in the
            batch and on the longest example there, so that one more example would change the
            gradients of all others.
    """

    def __init__(
        self,
        adapted: AdaptedModel,
        examples: Sequence[Example],
        mechanism: Mechanism,
        *,
        task: str,
        pad_id: int,
    ) -> None:
        if adapted.dropout:
            raise TrainingError(
                f"the adapter has dropout {adapted.dropout:g}, whose masks for one example depend "
                "on the others of its batch; set adapter.dropout = 0 to train with privacy"
            )
        self.adapted = adapted
        self.examples = examples
        self.mechanism = mechanism
        self.task = task
        self.pad_id = pad_id

    def train(
        self,
        work: LocalWork,
        settings: TrainingSection,
        moments: Mapping[str, Tensor] | None = None,
    ) -> LocalResult:
        """Takes `work.steps` private steps; a step with an empty batch is noise alone.

        `settings.batch_size` examples go through the model at once; the expected batch of a
        step is the mechanism's. `settings.max_grad_norm` is not used.

        Args:
            moments: optimiser state to continue from.

        Raises:
            TrainingError: the model mixes examples, or a parameter is not what is trained.
        """
        parameters = self.adapted.train_only(work.factors)
        optimizer = make_optimizer(parameters, settings, work.rates)
        restore_optimizer(optimizer, parameters, moments or {})
        rate_sum = 0.0
        with (
            training_mode(self.adapted, checkpointing=settings.gradient_checkpointing),
            per_sample(self.mechanism.per_sample, self.adapted.model, parameters) as listening,
        ):
            for step in range(work.steps):
                if work.progress is not None:
                    work.progress(step, work.steps)
                batch = self.mechanism.batch()
                sums = self._sums(batch, listening, settings)
                released = self.mechanism.released(sums, parameters)
                before = _copies(parameters) if step == 0 else {}
                for name, parameter in parameters.items():
                    parameter.grad = released[name]
                for term in work.terms:
                    term.edit_gradients(parameters)
                rate = move(optimizer, parameters, settings, work, step)
                if rate:
                    self._need_moved(before, work)
                rate_sum += rate
        return LocalResult(
            None,
            0,
            rate_sum,
            self.adapted.state().tensors,
            optimizer_tensors(optimizer, parameters),
        )

    def _sums(
        self,
        batch: Sequence[int],
        listening: PerSample,
        settings: TrainingSection,
    ) -> dict[str, Tensor]:
        """The clipped sum over a batch, from micro-batches; nothing for an empty batch."""
        sums: dict[str, Tensor] = {}
        size = settings.batch_size

        def clipped(numbers: Sequence[int]) -> dict[str, Tensor]:
            try:
                return self.clipped(listening, numbers, settings)
            finally:
                listening.begin(0)

        for first in range(0, len(batch), size):
            # halved within the step: the same batch, and noise is drawn once, at its end
            for part in in_halves(batch[first : first + size], clipped):
                for name, value in part.items():
                    sums[name] = sums[name] + value if name in sums else value
        return sums

    def clipped(
        self, listening: PerSample, numbers: Sequence[int], settings: TrainingSection
    ) -> dict[str, Tensor]:
        """The sum of the clipped gradients of one micro-batch."""
        device = next(self.adapted.model.parameters()).device
        listening.begin(len(numbers))
        inputs = collate([self.examples[i] for i in numbers], self.pad_id).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == "bf16"):
            losses = self.losses(inputs)
        # the sum: a mean would scale every gradient by the size of the batch
        losses.sum().backward()  # type: ignore[no-untyped-call]
        return self.mechanism.clipped(listening.pieces())

    def losses(self, inputs: Batch) -> Tensor:
        """Each example's own loss, (n,)."""
        return example_losses(self.adapted.model, inputs, self.task)

    def check_additive(self, factors: Sequence[str], settings: TrainingSection) -> None:
        """Refuses a model in which one example changes the gradient of another.

        Made-up examples are enough to see that, so that nothing is spent.

        Raises:
            TrainingError: it does, so that clipping bounds nothing.
        """
        parameters = self.adapted.train_only(factors)
        # of unequal length
        one, other = (made_up(self.adapted, self.examples[0], i, 6 - 2 * i) for i in (0, 1))
        with (
            training_mode(self.adapted, checkpointing=settings.gradient_checkpointing),
            per_sample(self.mechanism.per_sample, self.adapted.model, parameters) as listening,
        ):
            alone = [self._whole(listening, [example]) for example in (one, other)]
            together = self._whole(listening, [one, other])
        for name, found in together.items():
            expected = torch.cat([part[name] for part in alone])
            if float((found - expected).norm()) > 1e-3 * float(expected.norm()):
                raise TrainingError(
                    f"the gradient of one example for {name} changes with the other examples of "
                    "its batch, so that clipping would bound nothing; train without privacy, or "
                    "choose a model without normalisation or routing over the batch"
                )

    def _whole(self, listening: PerSample, examples: Sequence[Example]) -> dict[str, Tensor]:
        device = next(self.adapted.model.parameters()).device
        listening.begin(len(examples))
        self.losses(collate(examples, self.pad_id).to(device)).sum().backward()  # type: ignore[no-untyped-call]
        found = {name: piece.whole().detach().cpu() for name, piece in listening.pieces().items()}
        listening.begin(0)
        return found

    def _need_moved(self, before: Mapping[str, Tensor], work: LocalWork) -> None:
        """The model's own parameters have moved, not others that once were its own."""
        here = self.adapted.parameters()
        for name, old in before.items():
            multiplier = work.rates.get(name.rpartition(".")[2], 1.0)
            if multiplier and torch.equal(here[name].detach(), old):
                raise TrainingError(
                    f"{name} did not move in a private step, so the optimiser trains something "
                    "else than the model; build the model and the adapter again"
                )


def train_private(
    adapted: AdaptedModel, training: Training, settings: TrainingSection, *, task: str, pad_id: int
) -> LocalResult:
    """Does a training that has a mechanism; see `PrivateTrainer`."""
    training.put(adapted)
    trainer = check_private_training(adapted, training, settings, task=task, pad_id=pad_id)
    return trainer.train(training.work, settings, training.moments)


def check_private_training(
    adapted: AdaptedModel, training: Training, settings: TrainingSection, *, task: str, pad_id: int
) -> PrivateTrainer:
    """The trainer of a training, which the model must already hold.

    Raises:
        TrainingError: the model or its adapter makes examples depend on each other, which is
            looked for once per model.
    """
    assert training.mechanism is not None, "a private training has a mechanism"
    trainer = PrivateTrainer(
        adapted, training.examples, training.mechanism, task=task, pad_id=pad_id
    )
    if adapted.model not in _ADDITIVE:
        trainer.check_additive(training.work.factors, settings)
        _ADDITIVE.add(adapted.model)
    return trainer


def _copies(parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in parameters.items()}
