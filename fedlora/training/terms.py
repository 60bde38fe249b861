"""Terms that a federation adds to a client's own gradient.

Each edits the gradients of one optimiser step after they are averaged over the batch and
before they are clipped; `Freeze` also undoes what the optimiser did to slots it must leave.
Gradients are written out: a penalty never builds a graph, and never a d x k matrix.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from fedlora.adapter import LayerSpec, Tensors

Parameters = Mapping[str, nn.Parameter]


class Term(Protocol):
    """One addition to local training."""

    def edit_gradients(self, parameters: Parameters) -> None:
        """Changes the gradients of a step."""
        ...

    def after_step(self, parameters: Parameters) -> None:
        """Called when the optimiser has moved the parameters."""
        ...


@dataclass(frozen=True)
class Proximal:
    """mu/2 ||theta - start||^2 over all trained tensors: gradient mu (theta - start).

    Li et al., "Federated Optimization in Heterogeneous Networks",
    https://arxiv.org/abs/1812.06127, section 3.2.

    Args:
        mu: weight of the penalty.
        start: values at the start of the round.
    """

    mu: float
    start: Tensors

    def edit_gradients(self, parameters: Parameters) -> None:
        for name, parameter in parameters.items():
            anchor = self.start[name].to(parameter)
            _add(parameter, self.mu * (parameter.detach() - anchor))

    def after_step(self, parameters: Parameters) -> None:
        pass


@dataclass(frozen=True)
class ProductProximal:
    """mu/2 ||s B A - s B_0 A_0||_F^2 per layer, and `Proximal` on the heads.

    The same penalty on the weight change itself, which does not depend on how the change is
    divided between the factors.

    Args:
        mu: weight of the penalty.
        start: all factors and heads at the start of the round.
        layers: the adapted layers, of an s B A method.
    """

    mu: float
    start: Tensors
    layers: Sequence[LayerSpec]

    def edit_gradients(self, parameters: Parameters) -> None:
        factors = {f"{layer.name}.{f}" for layer in self.layers for f in ("A", "B")}
        heads = {name: p for name, p in parameters.items() if name not in factors}
        Proximal(self.mu, self.start).edit_gradients(heads)
        for layer in self.layers:
            a_name, b_name = f"{layer.name}.A", f"{layer.name}.B"
            a, b = (_value(name, parameters, self.start) for name in (a_name, b_name))
            a0, b0 = self.start[a_name].to(a), self.start[b_name].to(b)
            strength = self.mu * layer.scale**2
            if b_name in parameters:
                _add(parameters[b_name], strength * (b @ (a @ a.T) - b0 @ (a0 @ a.T)))
            if a_name in parameters:
                _add(parameters[a_name], strength * ((b.T @ b) @ a - (b.T @ b0) @ a0))

    def after_step(self, parameters: Parameters) -> None:
        pass


@dataclass(frozen=True)
class Correction:
    """Adds c - c_i to the gradients.

    Karimireddy et al., "SCAFFOLD: Stochastic Controlled Averaging for Federated Learning",
    https://arxiv.org/abs/1910.06378, algorithm 1.

    Args:
        difference: c - c_i by tensor name.
    """

    difference: Tensors

    def edit_gradients(self, parameters: Parameters) -> None:
        for name, value in self.difference.items():
            _add(parameters[name], value.to(parameters[name]))

    def after_step(self, parameters: Parameters) -> None:
        pass


@dataclass(frozen=True)
class TailPenalty:
    """weight * ||B[:, slot:]||_F ||A[slot:, :]||_F per layer, which empties the last slots.

    Cho et al., "Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation Models",
    https://arxiv.org/abs/2401.06432, section 3.2.

    Args:
        weight: lambda.
        slot: first slot of the tail.
        layers: the adapted layers, of an s B A method.
    """

    weight: float
    slot: int
    layers: Sequence[LayerSpec]

    def edit_gradients(self, parameters: Parameters) -> None:
        for layer in self.layers:
            a, b = parameters[f"{layer.name}.A"], parameters[f"{layer.name}.B"]
            tail_a, tail_b = a.detach()[self.slot :], b.detach()[:, self.slot :]
            norm_a, norm_b = tail_a.norm(), tail_b.norm()
            # at zero the norm has no gradient; zero is in its subdifferential
            if norm_a > 0 and norm_b > 0:
                grad_a, grad_b = torch.zeros_like(a), torch.zeros_like(b)
                grad_a[self.slot :] = self.weight * norm_b * tail_a / norm_a
                grad_b[:, self.slot :] = self.weight * norm_a * tail_b / norm_b
                _add(a, grad_a)
                _add(b, grad_b)

    def after_step(self, parameters: Parameters) -> None:
        pass


@dataclass(frozen=True)
class Freeze:
    """Leaves the entries where a mask is 0 as they were, whatever momentum or decay say.

    Args:
        masks: tensor name -> mask of zeros and ones, broadcastable to the tensor.
        start: values at the start of the round.
    """

    masks: Tensors
    start: Tensors

    def edit_gradients(self, parameters: Parameters) -> None:
        for name, mask in self.masks.items():
            gradient = parameters[name].grad
            if gradient is not None:
                gradient.mul_(mask.to(gradient))

    @torch.no_grad()
    def after_step(self, parameters: Parameters) -> None:
        for name, mask in self.masks.items():
            parameter = parameters[name]
            kept = mask.to(parameter.device).bool()
            parameter.copy_(torch.where(kept, parameter, self.start[name].to(parameter)))


def _value(name: str, parameters: Parameters, start: Tensors) -> Tensor:
    """The trained parameter, or the frozen factor."""
    if name in parameters:
        return parameters[name].detach()
    like = next(iter(parameters.values()))
    return start[name].to(like)


def _add(parameter: nn.Parameter, gradient: Tensor) -> None:
    parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
