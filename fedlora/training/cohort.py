"""Cohort: the local training of several clients in one forward and backward pass per step.

Their adapters stand side by side on one frozen base, and every client keeps its own data,
loss, clipping, learning rate and optimiser state. What is computed for one client depends on
nothing of another one, so that the result is that of `train` up to rounding.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fedlora.adapters.inject import AdaptedModel
from fedlora.adapters.stacked import StackedModel
from fedlora.config.job import TrainingSection
from fedlora.data.example import IGNORE, Batch
from fedlora.data.order import batch_order, example_lengths, loader
from fedlora.errors import TrainingError
from fedlora.seeds import generator
from fedlora.training.loss import token_losses
from fedlora.training.memory import Shares
from fedlora.training.mode import training_mode
from fedlora.training.optimizer import learning_rate
from fedlora.training.rows import Rows
from fedlora.training.trainer import LocalResult, Training, diverged

# of every client: summed losses, and how much they are sums over
_Sums = tuple[list[float], list[int]]


@dataclass
class _Client:
    """One client under way: where it stands, and what it has seen."""

    place: int
    training: Training
    batches: Iterator[Batch]
    key: int = 0
    loss: float = 0.0
    count: int = 0
    rate_sum: float = 0.0
    error: TrainingError | None = None


class Cohort:
    """Trains several clients on one model.

    Args:
        adapted: the model, without an `obstacle`.
        trainings: of the same spec, folds, factors and multipliers of the learning rate.
        settings: how to train; the same for all.
        task: the model's task.
        pad_id: padding token.
        width: most clients in one forward pass; halved when memory runs out.
    """

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
        self._shares = Shares(width)
        # who has more steps comes first, so that the active ones are always the first rows
        order = sorted(range(len(trainings)), key=lambda i: -trainings[i].work.steps)
        self._clients = [
            _Client(place, trainings[place], self._batches(trainings[place])) for place in order
        ]

    def train(self) -> list[LocalResult | TrainingError]:
        """The result of every training, in the order they were given."""
        first = self._clients[0].training
        first.put(self.adapted)
        trained = self.adapted.train_only(first.work.factors)
        start = [client.training.start.tensors for client in self._clients]
        frozen = {
            name: torch.stack([tensors[name] for tensors in start])
            for name in start[0]
            if name not in trained and not all(torch.equal(start[0][name], t[name]) for t in start)
        }
        like = next(iter(trained.values()))
        self._rows = Rows(
            {name: parameter.shape for name, parameter in trained.items()},
            start,
            [client.training.moments for client in self._clients],
            self.settings,
            first.work.rates,
            like,
        )
        self._frozen = {name: value.to(like) for name, value in frozen.items()}
        self._parameters = {
            row: self._rows.parameters(row)
            for row, client in enumerate(self._clients)
            if client.training.work.terms
        }
        stacked = StackedModel(self.adapted, [*trained, *frozen])
        checkpointing = self.settings.gradient_checkpointing
        with training_mode(self.adapted, checkpointing=checkpointing), stacked:
            for step in range(first.work.steps):
                self._step(stacked, step)
        found = {client.place: self._result(row) for row, client in enumerate(self._clients)}
        return [found[place] for place in sorted(found)]

    def _batches(self, training: Training) -> Iterator[Batch]:
        work = training.work
        order = batch_order(
            len(training.examples),
            self.settings.batch_size,
            work.steps * self.settings.accumulation,
            generator(work.seed, work.stream, work.client, work.round),
            example_lengths(training.examples) if self.settings.length_bucketed else None,
        )
        return loader(training.examples, order, self.pad_id, self.settings.num_workers)

    def _step(self, stacked: StackedModel, step: int) -> None:
        active = sum(client.training.work.steps > step for client in self._clients)
        clients = self._clients[:active]
        counts = [0] * active
        gradients = self._rows.gradients
        for index in range(self.settings.accumulation):
            batches = [next(client.batches) for client in clients]
            for client in clients:
                client.key = client.training.work.dropout_key(step, index)

            def share(rows: slice, batches: Sequence[Batch] = batches) -> _Sums:
                # where memory runs out, nothing is added to the gradients yet
                return self._pass(stacked, clients[rows], batches[rows], rows)

            for rows, (sums, seen) in self._shares.each(active, share):
                for place, row in enumerate(range(rows.start, rows.stop)):
                    clients[row].loss += sums[place]
                    counts[row] += seen[place]
        divisors = torch.tensor([max(1, count) for count in counts])
        gradients[:active] /= divisors.to(gradients)[:, None]
        rates = []
        for row, client in enumerate(clients):
            work = client.training.work
            if client.error is None and not math.isfinite(client.loss):
                client.error = diverged(work, step, client.loss)
            client.count += counts[row]
            rate = learning_rate(self.settings, work.first_step + step, work.total_steps)
            client.rate_sum += rate
            rates.append(rate)
            for term in work.terms:
                term.edit_gradients(self._parameters[row])
        if self.settings.max_grad_norm:
            self._rows.clip(self.settings.max_grad_norm, active)
        self._rows.move(rates)
        for row, client in enumerate(clients):
            for term in client.training.work.terms:
                term.after_step(self._parameters[row])

    def _pass(
        self,
        stacked: StackedModel,
        clients: Sequence[_Client],
        batches: Sequence[Batch],
        rows: slice,
    ) -> _Sums:
        """Adds the gradients of one micro-batch of some clients; their summed losses and counts."""
        room = max(len(batch.target) for batch in batches)
        values = {
            name: value.detach().requires_grad_()
            for name, value in self._rows.tensors(self._rows.values, rows).items()
        }
        stacked.hold({**values, **{name: value[rows] for name, value in self._frozen.items()}})
        self.adapted.key_dropout(*(client.key for client in clients), room=room)
        device = self._rows.values.device
        batch = join(batches, self.pad_id).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=self.settings.precision == "bf16"):
            each = token_losses(self.adapted.model, batch, self.task)
        sums = each.losses.view(len(clients), -1).sum(1)  # (K,)
        # each client's loss reaches its own factors alone, so their sum has all the gradients
        found = torch.autograd.grad(sums.sum(), list(values.values()), allow_unused=True)
        self._rows.add(rows, dict(zip(values, found, strict=True)))
        counts = each.counted.view(len(clients), -1).sum(1)
        return sums.detach().tolist(), counts.tolist()

    def _result(self, row: int) -> LocalResult | TrainingError:
        client = self._clients[row]
        if client.error is not None:
            return client.error
        trained = self._rows.client(self._rows.values, row)
        return LocalResult(
            client.loss / client.count if client.count else None,
            client.count,
            client.rate_sum,
            {**client.training.start.tensors, **trained},
            self._rows.moments(row),
        )


def join(batches: Sequence[Batch], pad_id: int) -> Batch:
    """One batch of all, client after client, padded to the most rows and the longest text.

    Rows that fill up a client's part count for nothing: their targets are IGNORE.
    """
    room = max(len(batch.target) for batch in batches)
    fill = {"input_ids": pad_id, "attention_mask": 0}
    inputs = {
        name: torch.cat(_padded([batch.inputs[name] for batch in batches], room, fill.get(name, 0)))
        for name in batches[0].inputs
    }
    target = torch.cat(_padded([batch.target for batch in batches], room, IGNORE))
    if "attention_mask" in inputs:
        # a row that sees nothing has no softmax
        inputs["attention_mask"][:, 0] = 1
    return Batch(inputs, target)


def _padded(tensors: Sequence[Tensor], room: int, value: int) -> list[Tensor]:
    """(n, ...) and for texts (n, T) each, as (room, ..., longest T)."""
    longest = max(tensor.shape[-1] for tensor in tensors) if tensors[0].dim() == 2 else 0
    found = []
    for tensor in tensors:
        if longest:
            tensor = F.pad(tensor, (0, longest - tensor.shape[1]), value=value)
        missing = room - len(tensor)
        found.append(F.pad(tensor, (0, 0) * (tensor.dim() - 1) + (0, missing), value=value))
    return found
