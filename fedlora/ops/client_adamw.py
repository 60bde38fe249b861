"""AdamW of many clients at once, over one flat buffer of their parameters.

Loshchilov and Hutter, "Decoupled Weight Decay Regularization",
https://arxiv.org/abs/1711.05101, algorithm 2; in the order of operations of torch.optim.AdamW,
so that a row moves as that client's own optimiser would move it. Gradients are clipped first,
if asked, as torch.nn.utils.clip_grad_norm_ does.

Shapes: K clients, P parameters of each.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from fedlora.ops.registry import uses_triton


@dataclass(frozen=True)
class AdamWBuffers:
    """What a step changes in place.

    Attributes:
        parameters: (K, P) float32 or float64; all may be columns of wider buffers.
        first, second: running means of the gradients and of their squares, alike.
        narrow: a copy of the parameters in a shorter format, (K, P), kept up to date; or None.
    """

    parameters: Tensor
    first: Tensor
    second: Tensor
    narrow: Tensor | None = None


@dataclass(frozen=True)
class AdamWStep:
    """One step's settings, by client, on the device of the buffers.

    Attributes:
        rate: learning rates (K,).
        step: number of the step that is taken, from 1, (K,).
        active: who takes it, (K,) bool; the rows of the others keep every bit.
        weight_decay: (K,).
        max_norm: largest L2 norm of a client's gradient, (K,), inf for any; None for any for all.
        multiplier: factor of the learning rate by parameter, (P,); None for 1.
        betas: decay of the running means.
        eps: added to the root of the second.
    """

    rate: Tensor
    step: Tensor
    active: Tensor
    weight_decay: Tensor
    max_norm: Tensor | None = None
    multiplier: Tensor | None = None
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8


def client_adamw_(buffers: AdamWBuffers, grads: Tensor, step: AdamWStep) -> None:
    """Takes one step of every active client.

    Args:
        buffers: changed in place.
        grads: (K, P), of the parameters' format or a narrower one; unchanged. Rows of clients
            that are not active may hold anything.
        step: the settings.
    """
    _step(
        buffers.parameters,
        buffers.first,
        buffers.second,
        buffers.narrow,
        grads,
        _by_client(grads, step, buffers.parameters.dtype),
        step.active,
        step.multiplier,
        *step.betas,
        step.eps,
    )


def _by_client(grads: Tensor, step: AdamWStep, dtype: torch.dtype) -> Tensor:
    """Numbers of every client, (K, 6) float64.

    Scale of the gradient, rate of decay, size of the step, root of the bias of v; and for torch's
    own kernel, learning rate and number of the step.
    """
    rate, count = step.rate.double(), step.step.double()
    scale = torch.ones_like(rate)
    if step.max_norm is not None:
        norms = torch.linalg.vector_norm(grads, dim=1, dtype=dtype)
        scale = (step.max_norm / (norms + 1e-6)).clamp_max(1.0).double()
    first, second = step.betas
    decay = rate * step.weight_decay.double()
    size = rate / (1.0 - first**count)
    bias = (1.0 - second**count).sqrt()
    return torch.stack([scale, decay, size, bias, rate, count], 1)


@torch.library.custom_op(
    "fedlora::client_adamw_", mutates_args=("parameters", "first", "second", "narrow")
)
def _step(
    parameters: Tensor,
    first: Tensor,
    second: Tensor,
    narrow: Tensor | None,
    grads: Tensor,
    by_client: Tensor,
    active: Tensor,
    multiplier: Tensor | None,
    beta1: float,
    beta2: float,
    eps: float,
) -> None:
    if uses_triton(parameters) and parameters.dtype == torch.float32:
        from fedlora.ops.kernels.client_adamw import client_adamw_ as kernel

        kernel(
            (parameters, first, second, narrow),
            grads,
            by_client[:, :4].float().contiguous(),
            active,
            multiplier,
            (beta1, beta2),
            eps,
        )
        return
    if multiplier is None and parameters.device.type == "cpu":
        _in_one_pass((parameters, first, second), grads, by_client, active, (beta1, beta2), eps)
        if narrow is not None:
            narrow[active] = parameters[active].to(narrow.dtype)
        return
    by_client = by_client.to(parameters.dtype)
    everyone = bool(active.all())
    rows = slice(None) if everyone else active.nonzero().flatten()
    p, m, v = parameters[rows], first[rows], second[rows]
    scale, decay, size, bias = by_client[rows, :4].unsqueeze(2).unbind(1)  # (K, 1) each
    factor = 1.0 if multiplier is None else multiplier.to(parameters.dtype)
    g = grads[rows].to(parameters.dtype)
    if not bool((scale == 1.0).all()):
        g = g * scale
    p.mul_(1.0 - decay * factor)
    m.lerp_(g, 1.0 - beta1)
    v.mul_(beta2).addcmul_(g, g, value=1.0 - beta2)
    p.sub_((m * (size * factor)).div_(v.sqrt().div_(bias).add_(eps)))
    if not everyone:
        parameters[rows], first[rows], second[rows] = p, m, v
    if narrow is not None:
        narrow[rows] = p.to(narrow.dtype)


def _in_one_pass(
    buffers: tuple[Tensor, Tensor, Tensor],
    grads: Tensor,
    by_client: Tensor,
    active: Tensor,
    betas: tuple[float, float],
    eps: float,
) -> None:
    """By torch's kernel for processors, which reads and writes every number once."""
    numbers = by_client.tolist()
    alike: dict[tuple[float, ...], list[int]] = {}
    for k in active.nonzero().flatten().tolist():
        alike.setdefault(tuple(numbers[k]), []).append(k)
    for (scale, decay, _, _, rate, count), clients in alike.items():
        own = [[buffer[k] for k in clients] for buffer in buffers]
        rows = [grads[k].to(own[0][0].dtype) for k in clients]
        adamw(
            own[0],
            rows if scale == 1.0 else [row * scale for row in rows],
            own[1],
            own[2],
            [],
            [torch.tensor(count - 1.0, dtype=torch.float32, device="cpu") for _ in clients],
            fused=True,
            amsgrad=False,
            maximize=False,
            beta1=betas[0],
            beta2=betas[1],
            lr=rate,
            weight_decay=decay / rate if rate else 0.0,
            eps=eps,
        )


@_step.register_fake
def _(
    parameters: Tensor,
    first: Tensor,
    second: Tensor,
    narrow: Tensor | None,
    grads: Tensor,
    by_client: Tensor,
    active: Tensor,
    multiplier: Tensor | None,
    beta1: float,
    beta2: float,
    eps: float,
) -> None:
    return None
