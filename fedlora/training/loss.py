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
    logits: Tensor = model(**batch.inputs).logits
    if task == "causal-lm":
        logits = logits[:, :-1].flatten(0, 1)  # (n * (T - 1), vocabulary)
        target = batch.target[:, 1:].flatten()
    else:
        target = batch.target
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    total = F.cross_entropy(logits, target, ignore_index=IGNORE, reduction="sum")
    counted = target != IGNORE
    correct = int(((logits.detach().argmax(-1) == target) & counted).sum())
    return LossSum(total, int(counted.sum()), correct)
