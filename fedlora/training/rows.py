"""Rows: the trained tensors of several clients in one buffer, and their optimiser.

One row per client. What an optimiser does to every number alike is one operation over all
clients; rates, steps and norms are columns, so that no client sees another.
"""

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from fedlora.adapter import Tensors
from fedlora.config.job import TrainingSection
from fedlora.ops.client_adamw import AdamWBuffers, AdamWStep, client_adamw_

_MOMENTS = {"adamw": ("exp_avg", "exp_avg_sq"), "sgd": ("momentum_buffer",)}


class Rows:
    """K clients' trained tensors, (K, P), with gradients and moments of the same shape.

    Args:
        shapes: name -> shape of one client's tensor.
        start: each client's values; may hold other names as well.
        moments: each client's optimiser state to continue from, as `optimizer_tensors` names it.
        settings: which optimiser.
        rates: factor -> multiplier of the learning rate.
        like: gives device and dtype.
    """

    def __init__(
        self,
        shapes: Mapping[str, Sequence[int]],
        start: Sequence[Tensors],
        moments: Sequence[Tensors],
        settings: TrainingSection,
        rates: Mapping[str, float],
        like: Tensor,
    ) -> None:
        self.settings = settings
        self._places: dict[str, tuple[slice, tuple[int, ...]]] = {}
        end = 0
        for name, shape in shapes.items():
            begin, end = end, end + math.prod(shape)
            self._places[name] = (slice(begin, end), tuple(shape))
        self.values = torch.empty(len(start), end, device=like.device, dtype=like.dtype)
        for row, tensors in enumerate(start):
            self.values[row] = torch.cat([tensors[name].flatten() for name in shapes]).to(like)
        self.gradients = torch.zeros_like(self.values)
        multipliers = {name: rates.get(name.rpartition(".")[2], 1.0) for name in shapes}
        self._multiplier = torch.ones(end, device=like.device, dtype=like.dtype)
        for name, (place, _) in self._places.items():
            self._multiplier[place] = multipliers[name]
        self._plain = set(multipliers.values()) <= {1.0}
        self._used: set[str] = set()
        self._restore(moments)

    def tensors(self, source: Tensor, rows: slice) -> dict[str, Tensor]:
        """Views of `source` (K, P) by name, (k, *shape) each, of some clients."""
        part = source[rows]
        return {
            name: part[:, place].view(len(part), *shape)
            for name, (place, shape) in self._places.items()
        }

    def client(self, source: Tensor, row: int) -> dict[str, Tensor]:
        """One client's tensors of `source` (K, P) by name, copied to the CPU as a whole."""
        held = source[row].to("cpu", copy=True)
        return {name: held[place].view(shape) for name, (place, shape) in self._places.items()}

    def add(self, rows: slice, gradients: Mapping[str, Tensor | None]) -> None:
        """Adds gradients (k, *shape) of some clients; None for a tensor that was not used."""
        own = self.tensors(self.gradients, rows)
        for name, gradient in gradients.items():
            if gradient is not None:
                own[name] += gradient
                self._used.add(name)

    def parameters(self, row: int) -> dict[str, nn.Parameter]:
        """One client's tensors with their gradients, as views that may be edited in place."""
        rows = slice(row, row + 1)
        gradients = self.tensors(self.gradients, rows)
        found = {}
        for name, value in self.tensors(self.values, rows).items():
            found[name] = nn.Parameter(value[0])
            found[name].grad = gradients[name][0]
        return found

    def clip(self, norm: float, active: int) -> None:
        """Scales the gradients of the first `active` clients down to a norm, each for itself."""
        gradients = self.gradients[:active]
        norms = torch.linalg.vector_norm(gradients, dim=1, keepdim=True)
        gradients.mul_((norm / (norms + 1e-6)).clamp(max=1.0))

    def move(self, rates: Sequence[float]) -> None:
        """One step of the first clients at their learning rates; clears their gradients."""
        active = len(rates)
        used = torch.tensor([float(name in self._used) for name in self._places])
        self._steps[:active] += used
        for place, steps in self._runs(active):
            multiplier = None if self._plain else self._multiplier[place]
            if self.settings.optimizer == "adamw":
                self._adamw(place, rates, steps, multiplier)
            else:
                self._sgd(place, rates, multiplier)
        self.gradients[:active].zero_()
        self._used.clear()

    def _runs(self, active: int) -> Iterator[tuple[slice, list[float]]]:
        """Columns of tensors that are moved alike, and the step that each client takes (k,).

        A tensor without a gradient is in none: it has no decay either.
        """
        begin = end = 0
        held: list[float] | None = None
        columns = self._steps[:active].T.tolist()
        for (name, (place, _)), column in zip(self._places.items(), columns, strict=True):
            steps = column if name in self._used else None
            if steps is None or steps != held:
                if held is not None:
                    yield slice(begin, end), held
                begin, held = place.start, steps
            end = place.stop
        if held is not None:
            yield slice(begin, end), held

    def _adamw(
        self, place: slice, rates: Sequence[float], steps: list[float], multiplier: Tensor | None
    ) -> None:
        active = len(rates)
        rate = self._column(rates)
        mean, square = (moment[:active, place] for moment in self._moments)
        client_adamw_(
            AdamWBuffers(self.values[:active, place], mean, square),
            self.gradients[:active, place],
            AdamWStep(
                rate,
                self._column(steps),
                torch.ones_like(rate, dtype=torch.bool),
                torch.full_like(rate, self.settings.weight_decay),
                multiplier=multiplier,
            ),
        )

    def _sgd(self, place: slice, rates: Sequence[float], multiplier: Tensor | None) -> None:
        active = len(rates)
        value, gradient = self.values[:active, place], self.gradients[:active, place]
        rate = self._column(rates).to(value)[:, None]
        if multiplier is not None:
            rate = rate * multiplier
        if self.settings.weight_decay:
            gradient.add_(value, alpha=self.settings.weight_decay)
        if self.settings.momentum:
            buffer = self._moments[0][:active, place]
            buffer.mul_(self.settings.momentum).add_(gradient)
            gradient.copy_(buffer)
        value.sub_(gradient.mul_(rate))

    def moments(self, row: int) -> dict[str, Tensor]:
        """One client's optimiser state, as `optimizer_tensors` names it."""
        taken = zip(self._places, self._steps[row].tolist(), strict=True)
        known = {name: steps for name, steps in taken if steps}
        found = {}
        for moment, buffer in zip(self._names, self._moments, strict=True):
            values = self.client(buffer, row)
            found.update({f"{name}.{moment}": values[name] for name in known})
        if self.settings.optimizer == "adamw":
            found.update({f"{name}.step": torch.tensor(steps) for name, steps in known.items()})
        return found

    def _restore(self, moments: Sequence[Tensors]) -> None:
        self._names = _MOMENTS[self.settings.optimizer] if self._keeps() else ()
        self._moments = [torch.zeros_like(self.values) for _ in self._names]
        # of every client and tensor: one that was not trained before starts afresh
        self._steps = torch.zeros(len(moments), len(self._places), dtype=torch.float64)
        for row, tensors in enumerate(moments):
            for column, (name, (place, shape)) in enumerate(self._places.items()):
                found = [tensors.get(f"{name}.{moment}") for moment in self._names]
                if not found or any(f is None or tuple(f.shape) != shape for f in found):
                    continue
                for buffer, value in zip(self._moments, found, strict=True):
                    assert value is not None
                    buffer[row, place] = value.flatten().to(buffer)
                self._steps[row, column] = float(tensors.get(f"{name}.step", 1.0))

    def _keeps(self) -> bool:
        return self.settings.optimizer == "adamw" or bool(self.settings.momentum)

    def _column(self, numbers: Sequence[float]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.float64, device=self.values.device)
