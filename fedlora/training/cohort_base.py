"""CohortBase: several clients on one model, step by step, and each with an optimiser of its own.

Their adapters stand side by side on one frozen base. What a step's gradients are, a subclass
says; everything else is the same for all of them, and what is computed for one client depends
on nothing of another one.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from fedlora.adapters.inject import AdaptedModel
from fedlora.adapters.stacked import StackedModel
from fedlora.config.job import TrainingSection
from fedlora.errors import TrainingError
from fedlora.training.memory import Shares
from fedlora.training.mode import training_mode
from fedlora.training.optimizer import learning_rate
from fedlora.training.rows import Rows
from fedlora.training.trainer import LocalResult, Training


class CohortBase(ABC):
    """Trains several clients on one model.

    Args:
        adapted: the model, without an `obstacle`.
        trainings: of the same spec, folds, factors and multipliers of the learning rate.
        settings: how to train; the same for all.
        task: the model's task.
        pad_id: padding token.
        width: most clients in one forward pass; halved when memory runs out.

    Attributes:
        trainings: in the order of rows. Who has more steps comes first, so that the active
            ones are always the first rows.
        rows: what is trained, with gradients; made when training begins.
    """

    rows: Rows

    def __init__(
        self,
        adapted: AdaptedModel,
        trainings: Sequence[Training],
        settings: TrainingSection,
        *,
        task: str,
        pad_id: int,
        width: int,
    ) -> None:
        self.adapted = adapted
        self.settings = settings
        self.task = task
        self.pad_id = pad_id
        self._order = sorted(range(len(trainings)), key=lambda i: -trainings[i].work.steps)
        self.trainings = [trainings[place] for place in self._order]
        self._shares = Shares(width)
        self._rate_sums = [0.0] * len(trainings)

    def train(self) -> list[LocalResult | TrainingError]:
        """The result of every training, in the order they were given."""
        first = self.trainings[0]
        first.put(self.adapted)
        trained = self.adapted.train_only(first.work.factors)
        start = [training.start.tensors for training in self.trainings]
        frozen = {
            name: torch.stack([tensors[name] for tensors in start])
            for name in start[0]
            if name not in trained and not all(torch.equal(start[0][name], t[name]) for t in start)
        }
        like = next(iter(trained.values()))
        self.rows = Rows(
            {name: parameter.shape for name, parameter in trained.items()},
            start,
            [training.moments for training in self.trainings],
            self.settings,
            first.work.rates,
            like,
        )
        self._frozen = {name: value.to(like) for name, value in frozen.items()}
        self._parameters = {
            row: self.rows.parameters(row)
            for row, training in enumerate(self.trainings)
            if training.work.terms
        }
        stacked = StackedModel(self.adapted, [*trained, *frozen])
        checkpointing = self.settings.gradient_checkpointing
        with (
            training_mode(self.adapted, checkpointing=checkpointing),
            stacked,
            self._around(stacked, trained),
        ):
            for step in range(first.work.steps):
                active = sum(training.work.steps > step for training in self.trainings)
                self._step(stacked, step, active)
        found = {place: self._result(row) for row, place in enumerate(self._order)}
        return [found[place] for place in sorted(found)]

    def _around(
        self, stacked: StackedModel, trained: Mapping[str, nn.Parameter]
    ) -> AbstractContextManager[object]:
        """What all steps are taken in."""
        return nullcontext()

    @abstractmethod
    def _step(self, stacked: StackedModel, step: int, active: int) -> None:
        """Finds the gradients of the first so many clients in one step, and moves them."""

    @abstractmethod
    def _result(self, row: int) -> LocalResult | TrainingError:
        """What the training of a client left behind."""

    def _hold(
        self, stacked: StackedModel, values: Mapping[str, Tensor], rows: slice | Sequence[int]
    ) -> None:
        """Computes with these values, and with the frozen ones, of some clients."""
        stacked.hold({**values, **{name: value[rows] for name, value in self._frozen.items()}})

    def _move(self, step: int, active: int, *, clip: float = 0.0) -> None:
        """One step with the gradients as they are, but for terms and, if not 0, a clip after."""
        rates = []
        for row, training in enumerate(self.trainings[:active]):
            work = training.work
            rates.append(learning_rate(self.settings, work.first_step + step, work.total_steps))
            self._rate_sums[row] += rates[row]
            for term in work.terms:
                term.edit_gradients(self._parameters[row])
        if clip:
            self.rows.clip(clip, active)
        self.rows.move(rates)
        for row, training in enumerate(self.trainings[:active]):
            for term in training.work.terms:
                term.after_step(self._parameters[row])

    def _left(self, row: int, loss: float | None, count: int) -> LocalResult:
        """The result of a client with this mean loss over so many tokens or examples."""
        trained = self.rows.client(self.rows.values, row)
        return LocalResult(
            loss,
            count,
            self._rate_sums[row],
            {**self.trainings[row].start.tensors, **trained},
            self.rows.moments(row),
        )
