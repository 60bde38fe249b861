"""PrivateCohort: private training of several clients in one forward and backward pass per step.

Every client draws its own batch, which may be empty, clips each of its examples, and adds noise
of its own, once per step; so that the result is that of `PrivateTrainer` up to rounding, with the
same batches and the same noise.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from fedlora.adapters.stacked import StackedModel
from fedlora.data.example import collate
from fedlora.errors import TrainingError
from fedlora.privacy.mechanism import Mechanism, released
from fedlora.privacy.pieces import clipped_client_sums
from fedlora.privacy.stacked_taps import StackedTaps
from fedlora.training.cohort import join
from fedlora.training.cohort_base import CohortBase
from fedlora.training.loss import example_losses
from fedlora.training.memory import in_halves
from fedlora.training.private import check_private_training
from fedlora.training.trainer import LocalResult

# (row, numbers of its examples)
_Part = tuple[int, Sequence[int]]


class PrivateCohort(CohortBase):
    """Trains several clients, who all have mechanisms, on one model; see `CohortBase`.

    `settings.batch_size` examples of every client go through the model at once, and clients that
    have no more sit out; `settings.max_grad_norm` is not used.
    """

    def train(self) -> list[LocalResult | TrainingError]:
        """The result of every training, in the order they were given.

        Raises:
            TrainingError: the model or its adapter mixes examples, or the loss does not reach
                all that is trained.
        """
        first = self.trainings[0]
        first.put(self.adapted)
        check_private_training(
            self.adapted, first, self.settings, task=self.task, pad_id=self.pad_id
        )
        return super().train()

    def _around(self, stacked: StackedModel, trained: Mapping[str, nn.Parameter]) -> StackedTaps:
        self._trained = trained
        self._taps = StackedTaps(stacked, trained, self.rows.values.device)
        return self._taps

    def _step(self, stacked: StackedModel, step: int, active: int) -> None:
        mechanisms = [self._mechanism(row) for row in range(active)]
        batches = [mechanism.batch() for mechanism in mechanisms]
        wide = torch.promote_types(self.rows.values.dtype, torch.float32)
        sums = {
            name: parameter.new_zeros(active, *parameter.shape, dtype=wide)
            for name, parameter in self._trained.items()
        }
        size = self.settings.batch_size
        for first in range(0, max(map(len, batches)), size):
            parts = [
                (row, batch[first : first + size])
                for row, batch in enumerate(batches)
                if len(batch) > first
            ]

            def share(chosen: slice, parts: Sequence[_Part] = parts) -> dict[str, Tensor]:
                return self._fitting(stacked, parts[chosen])

            for chosen, found in self._shares.each(len(parts), share):
                rows = [row for row, _ in parts[chosen]]
                for name, value in found.items():
                    sums[name][rows] += value
        # once for the whole batch, however it was divided
        self.rows.add(slice(0, active), released(mechanisms, sums, self._trained))
        self._move(step, active)

    def _fitting(self, stacked: StackedModel, parts: Sequence[_Part]) -> dict[str, Tensor]:
        """`_clipped`; the examples of a single client are halved when memory runs out."""
        if len(parts) > 1:
            return self._clipped(stacked, parts)
        ((row, numbers),) = parts
        sums: dict[str, Tensor] = {}
        for found in in_halves(numbers, lambda some: self._clipped(stacked, [(row, some)])):
            for name, value in found.items():
                sums[name] = sums[name] + value if name in sums else value
        return sums

    def _clipped(self, stacked: StackedModel, parts: Sequence[_Part]) -> dict[str, Tensor]:
        """The sums of the clipped gradients of some clients' examples, (k, *shape) by name."""
        rows = [row for row, _ in parts]
        self._hold(stacked, self.rows.tensors(self.rows.values[rows], slice(None)), rows)
        batches = [
            collate([self.trainings[row].examples[number] for number in numbers], self.pad_id)
            for row, numbers in parts
        ]
        device = self.rows.values.device
        inputs = join(batches, self.pad_id).to(device)
        self._taps.begin(len(inputs.target))
        try:
            with torch.autocast(
                device.type, torch.bfloat16, enabled=self.settings.precision == "bf16"
            ):
                losses = example_losses(self.adapted.model, inputs, self.task)
            # each loss reaches the values of its own client alone
            losses.sum().backward()  # type: ignore[no-untyped-call]
            clips = [self._mechanism(row).clip for row in rows]
            return clipped_client_sums(self._taps.pieces(), clips)
        finally:
            self._taps.begin(0)

    def _mechanism(self, row: int) -> Mechanism:
        mechanism = self.trainings[row].mechanism
        assert mechanism is not None, "a private training has a mechanism"
        return mechanism

    def _result(self, row: int) -> LocalResult:
        return self._left(row, None, 0)
