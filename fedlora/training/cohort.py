"""Cohort: the local training of several clients in one forward and backward pass per step.

Every client keeps its own data, loss, clipping, learning rate and optimiser state, so that the
result is that of `train` up to rounding; see `CohortBase`.
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
from fedlora.training.cohort_base import CohortBase
from fedlora.training.loss import token_losses
from fedlora.training.trainer import LocalResult, Training, diverged

# of every client: summed losses, and how much they are sums over
_Sums = tuple[list[float], list[int]]


@dataclass
class _Client:
    """One client under way: where it stands, and what it has seen."""

    batches: Iterator[Batch]
    key: int = 0
    loss: float = 0.0
    count: int = 0
    error: TrainingError | None = None


class Cohort(CohortBase):
    """Trains several clients on one model; see `CohortBase` for the arguments."""

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
        super().__init__(adapted, trainings, settings, task=task, pad_id=pad_id, width=width)
        self._clients = [_Client(self._batches(training)) for training in self.trainings]

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

    def _step(self, stacked: StackedModel, step: int, active: int) -> None:
        clients = self._clients[:active]
        counts = [0] * active
        for index in range(self.settings.accumulation):
            batches = [next(client.batches) for client in clients]
            for client, training in zip(clients, self.trainings, strict=False):
                client.key = training.work.dropout_key(step, index)

            def share(rows: slice, batches: Sequence[Batch] = batches) -> _Sums:
                # where memory runs out, nothing is added to the gradients yet
                return self._pass(stacked, clients[rows], batches[rows], rows)

            for rows, (sums, seen) in self._shares.each(active, share):
                for place, row in enumerate(range(rows.start, rows.stop)):
                    clients[row].loss += sums[place]
                    counts[row] += seen[place]
        gradients = self.rows.gradients[:active]
        gradients /= torch.tensor([max(1, count) for count in counts]).to(gradients)[:, None]
        for row, client in enumerate(clients):
            if client.error is None and not math.isfinite(client.loss):
                client.error = diverged(self.trainings[row].work, step, client.loss)
            client.count += counts[row]
        self._move(step, active, clip=self.settings.max_grad_norm)

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
            for name, value in self.rows.tensors(self.rows.values, rows).items()
        }
        self._hold(stacked, values, rows)
        self.adapted.key_dropout(*(client.key for client in clients), room=room)
        device = self.rows.values.device
        batch = join(batches, self.pad_id).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=self.settings.precision == "bf16"):
            each = token_losses(self.adapted.model, batch, self.task)
        sums = each.losses.view(len(clients), -1).sum(1)  # (K,)
        # each client's loss reaches its own factors alone, so their sum has all the gradients
        found = torch.autograd.grad(sums.sum(), list(values.values()), allow_unused=True)
        self.rows.add(rows, dict(zip(values, found, strict=True)))
        counts = each.counted.view(len(clients), -1).sum(1)
        return sums.detach().tolist(), counts.tolist()

    def _result(self, row: int) -> LocalResult | TrainingError:
        client = self._clients[row]
        if client.error is not None:
            return client.error
        return self._left(row, client.loss / client.count if client.count else None, client.count)


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
