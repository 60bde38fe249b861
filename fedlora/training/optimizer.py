"""Optimisers of the adapter, their schedule, and their state as named tensors."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fedlora.config.job import TrainingSection


def make_optimizer(
    parameters: Mapping[str, nn.Parameter],
    settings: TrainingSection,
    rates: Mapping[str, float] | None = None,
) -> torch.optim.Optimizer:
    """AdamW or SGD over `parameters`, in the order of their names.

    Args:
        rates: factor -> multiplier of the learning rate, kept as "multiplier" of its group.
    """
    groups: dict[float, list[nn.Parameter]] = {}
    for name in sorted(parameters):
        multiplier = (rates or {}).get(name.rpartition(".")[2], 1.0)
        groups.setdefault(multiplier, []).append(parameters[name])
    ordered = [{"params": members, "multiplier": m} for m, members in groups.items()]
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(
            ordered, lr=settings.learning_rate, weight_decay=settings.weight_decay
        )
    return torch.optim.SGD(
        ordered,
        lr=settings.learning_rate,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
    )


def learning_rate(settings: TrainingSection, step: int, total_steps: int) -> float:
    """Learning rate of optimiser step `step` (0-based) of a run of `total_steps`."""
    peak, warmup = settings.learning_rate, settings.warmup_steps
    if step < warmup:
        return peak * (step + 1) / warmup
    if settings.schedule == "constant":
        return peak
    progress = (step - warmup) / max(1, total_steps - warmup)
    return peak * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]
) -> dict[str, Tensor]:
    """The optimiser's state: `<parameter>.<moment>` -> tensor on the CPU."""
    return {
        f"{name}.{moment}": torch.as_tensor(value).detach().cpu().clone()
        for name, parameter in parameters.items()
        for moment, value in optimizer.state.get(parameter, {}).items()
        if value is not None
    }


def restore_optimizer(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, nn.Parameter],
    tensors: Mapping[str, Tensor],
) -> None:
    """Gives every parameter whose moments are in `tensors` those moments.

    A parameter that was not trained when they were saved starts afresh, and so does one
    that has changed shape.
    """
    for name, parameter in parameters.items():
        moments = {
            key.rpartition(".")[2]: value
            for key, value in tensors.items()
            if key.rpartition(".")[0] == name
        }
        if moments and all(m.dim() == 0 or m.shape == parameter.shape for m in moments.values()):
            optimizer.state[parameter] = {
                key: value.clone() if value.dim() == 0 else value.to(parameter.device, copy=True)
                for key, value in moments.items()
            }
