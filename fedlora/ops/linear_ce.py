"""Cross-entropy of a frozen linear head, without ever holding all logits.

Logits are made, turned into the gradient of their own rows and used up one chunk of rows at a
time, as in Hsu et al., "Liger Kernel", https://arxiv.org/abs/2410.10989, section 3.2. The head
is frozen, so its own gradient is never needed; and a row's gradient is kept for a unit of its
own loss, so that whatever is made of the losses afterwards (a sum, a mean of each sequence,
weights) has exact gradients.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from fedlora.ops.registry import uses_triton

IGNORE = -100
# entries of one chunk of logits; 512 rows of a vocabulary of 128k
CHUNK = 2**26


def linear_ce(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor
) -> tuple[Tensor, Tensor]:
    """Each row's negative log-likelihood of `softmax(hidden W^T + b)`, and whether it is right.

    What `F.cross_entropy((hidden @ weight.T + bias).float(), target, reduction="none")` gives,
    with the product in the number format of autocast, if that is on.

    Args:
        hidden: (..., h).
        weight: (V, h), frozen.
        bias: (V,), frozen, or None.
        target: (...) int64, 0 to V - 1, or IGNORE where nothing counts.

    Returns:
        (...) losses in nats, float32 or wider, 0 where nothing counts; and (...) bool, whether
        the target has the largest logit.
    """
    assert not weight.requires_grad, "the head has a gradient of its own, which is not made here"
    assert bias is None or not bias.requires_grad
    hidden, weight = _as_autocast(hidden), _as_autocast(weight)
    losses, right, _ = _rows(
        hidden.flatten(0, -2),
        weight,
        None if bias is None else _as_autocast(bias),
        target.flatten(),
        torch.is_grad_enabled() and hidden.requires_grad,
    )
    return losses.view_as(target), right.view_as(target)


def _as_autocast(x: Tensor) -> Tensor:
    kind = x.device.type
    if not torch.is_autocast_enabled(kind) or x.dtype == torch.float64:
        return x
    return x.to(torch.get_autocast_dtype(kind))


@torch.library.custom_op("fedlora::linear_ce", mutates_args=())
def _rows(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, slopes: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(losses (M,), right (M,), gradients of the losses by `hidden`, (M, h) or (0, h))."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    losses = hidden.new_zeros(len(hidden), dtype=wide)
    right = torch.zeros_like(target, dtype=torch.bool)
    grads = torch.zeros_like(hidden) if slopes else hidden.new_empty(0, hidden.shape[1])
    for rows in torch.split(_counted(target), _chunk_rows(len(weight))):
        logits = F.linear(hidden[rows], weight, bias)
        losses[rows], right[rows], dlogits = _softmax(logits, target[rows], slopes)
        if slopes:
            grads[rows] = dlogits @ weight
    return losses, right, grads


def _counted(target: Tensor) -> Tensor:
    """The rows that need logits."""
    if target.is_cuda and torch.cuda.is_current_stream_capturing():
        # how many there are is not known inside a graph
        return torch.arange(len(target), device=target.device)
    return (target != IGNORE).nonzero().flatten()


def _chunk_rows(vocabulary: int) -> int:
    rows = max(1, CHUNK // vocabulary)
    return rows if rows < 128 else rows // 128 * 128


def _softmax(logits: Tensor, target: Tensor, slopes: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(losses, right, dlogits in the number format of `logits`); `logits` are used up."""
    if uses_triton(logits) and logits.dtype != torch.float64:
        from fedlora.ops.kernels.softmax_ce import softmax_ce_

        losses, right = softmax_ce_(logits, target, slopes)
        return losses, right, logits
    p = logits.to(torch.promote_types(logits.dtype, torch.float32))
    counted = target != IGNORE
    place = target.where(counted, 0)[:, None]
    largest, best = p.max(1, keepdim=True)
    p.sub_(largest)
    shifted = p.gather(1, place)
    total = p.exp_().sum(1, keepdim=True)
    losses = torch.where(counted, (total.log() - shifted).squeeze(1), 0.0)
    right = counted & (best == place).squeeze(1)
    if slopes:
        p.div_(total).scatter_add_(1, place, torch.full_like(shifted, -1.0))
        p.mul_(counted[:, None])
    return losses, right, p.to(logits.dtype)


@_rows.register_fake
def _(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, slopes: bool
) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.promote_types(hidden.dtype, torch.float32)
    return (
        hidden.new_empty(len(hidden), dtype=wide),
        torch.empty_like(target, dtype=torch.bool),
        torch.empty_like(hidden) if slopes else hidden.new_empty(0, hidden.shape[1]),
    )


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(output[2])


@once_differentiable
def _scaled(ctx: Any, grad: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
    (grads,) = ctx.saved_tensors
    return (grads * grad[:, None]).to(grads.dtype), None, None, None, None


_rows.register_autograd(_scaled, setup_context=_keep)
