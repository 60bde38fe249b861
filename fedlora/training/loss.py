"""Losses by token, so that a mean over micro-batches weighs every token alike.

Shapes: n examples, T tokens; a classification task has one target, as if T were 1.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedlora.data.example import IGNORE, Batch
from fedlora.ops.linear_ce import linear_ce
from fedlora.training.frozen_head import frozen_head


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


@dataclass(frozen=True)
class TokenLosses:
    """What a model makes of every position of a batch, (n, T) each.

    Attributes:
        losses: negative log-likelihood of the target in nats, in float32 or wider and with
            gradient; 0 where nothing counts.
        right: whether the target counts and has the largest logit.
        counted: whether the target counts.
    """

    losses: Tensor
    right: Tensor
    counted: Tensor

    def means(self) -> Tensor:
        """Each example's own mean loss over its counted tokens, (n,); 0 without any."""
        return self.losses.sum(1) / self.counted.sum(1).clamp_min(1)


def loss_sum(model: nn.Module, batch: Batch, task: str) -> LossSum:
    """The loss of one micro-batch, with float32 (or wider) logits.

    Args:
        model: a transformers model of `task`.
        batch: with targets at the positions of the inputs; the shift is done here.
        task: "causal-lm", or a classification task.
    """
    found = token_losses(model, batch, task)
    return LossSum(found.losses.sum(), int(found.counted.sum()), int(found.right.sum()))


def example_losses(model: nn.Module, batch: Batch, task: str) -> Tensor:
    """Each example's own mean loss in nats over its counted tokens, (n,); 0 without any.

    No example's loss depends on another one: a mean over the tokens of the batch, as
    transformers has it, would let one example rescale the gradients of all others.
    """
    return token_losses(model, batch, task).means()


def token_losses(model: nn.Module, batch: Batch, task: str) -> TokenLosses:
    """The losses of one micro-batch by position; see `loss_sum` for the arguments."""
    if task == "causal-lm":
        target = F.pad(batch.target[:, 1:], (0, 1), value=IGNORE)
        parts = frozen_head(model)
    else:
        target, parts = batch.target[:, None], None
    if parts is not None:
        hidden = parts.body(**batch.inputs).last_hidden_state
        losses, right = linear_ce(hidden, parts.head.weight, parts.head.bias, target)
        return TokenLosses(losses, right, target != IGNORE)
    logits: Tensor = model(**batch.inputs).logits
    rows = logits.flatten(0, -2).to(torch.promote_types(logits.dtype, torch.float32))
    losses = F.cross_entropy(rows, target.flatten(), ignore_index=IGNORE, reduction="none")
    right = rows.detach().argmax(-1).view_as(target) == target
    return TokenLosses(losses.view_as(target), right, target != IGNORE)
