"""Losses as sums and counts, so that a mean over micro-batches weighs every token alike."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedlora.data.example import IGNORE, Batch


@dataclass(frozen=True)
class LossSum:
    """A summed loss and what it is a sum over.

    Attributes:
        total: sum of the negative log-likelihoods in nats, with gradient.
        count: counted tokens, or examples of a classification task.
        correct: how many of them the model gets right (argmax).
    """

    total: Tensor
    count: int
    correct: int


def loss_sum(model: nn.Module, batch: Batch, task: str) -> LossSum:
    """The loss of one micro-batch, with float32 (or wider) logits.

    Args:
        model: a transformers model of `task`.
        batch: with targets at the positions of the inputs; the shift is done here.
        task: "causal-lm", or a classification task.
    """
    logits, target = predictions(model, batch, task)
    total = F.cross_entropy(logits, target, ignore_index=IGNORE, reduction="sum")
    counted = target != IGNORE
    correct = int(((logits.detach().argmax(-1) == target) & counted).sum())
    return LossSum(total, int(counted.sum()), correct)


def example_losses(model: nn.Module, batch: Batch, task: str) -> Tensor:
    """Each example's own mean loss in nats over its counted tokens, (n,); 0 without any.

    No example's loss depends on another one: a mean over the tokens of the batch, as
    transformers has it, would let one example rescale the gradients of all others.
    """
    logits, target = predictions(model, batch, task)
    return example_means(logits, target, len(batch.target))


def example_means(logits: Tensor, target: Tensor, count: int) -> Tensor:
    """The mean loss of each of `count` examples, from what `predictions` gives."""
    losses = F.cross_entropy(logits, target, ignore_index=IGNORE, reduction="none")
    losses = losses.view(count, -1)  # (n, T - 1) or (n, 1)
    counted = (target != IGNORE).view_as(losses).sum(1)
    return losses.sum(1) / counted.clamp_min(1)


def predictions(model: nn.Module, batch: Batch, task: str) -> tuple[Tensor, Tensor]:
    """Logits (m, classes or vocabulary), in float32 or wider, and targets (m,)."""
    logits: Tensor = model(**batch.inputs).logits
    if task == "causal-lm":
        logits = logits[:, :-1].flatten(0, 1)  # (n * (T - 1), vocabulary)
        target = batch.target[:, 1:].flatten()
    else:
        target = batch.target
    return logits.to(torch.promote_types(logits.dtype, torch.float32)), target
