"""Pieces: the gradients of one parameter by example, as sums of them are needed.

To clip, only the norm of every example's gradient and one weighted sum are needed. A piece
gives both without saying how it holds the gradients.

Shapes: N examples, T tokens, o and i outputs and inputs of a linear layer; K clients, whose
examples stand client after client, n of each.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from fedlora.ops.dp_lora_grads import squared_norms, weighted_sum


class Piece(Protocol):
    """The gradients of one parameter, one per example."""

    def squared_norms(self) -> Tensor:
        """Squared L2 norm of every example's gradient, (N,)."""
        ...

    def weighted_sum(self, weights: Tensor) -> Tensor:
        """sum_n w_n g_n, in the parameter's shape.

        Args:
            weights: (N,). An example of weight 0 may hold anything, also NaN.
        """
        ...

    def client_sums(self, weights: Tensor) -> Tensor:
        """`weighted_sum` over the examples of every client, (K, *shape).

        Args:
            weights: (K, n). An example of weight 0 may hold anything, also NaN.
        """
        ...

    def whole(self) -> Tensor:
        """Every example's gradient, (N, *shape)."""
        ...


class Whole:
    """Gradients that are there as they are, (N, *shape).

    Args:
        grads: the gradients.
        squares: their squared norms (N,), if they are known.
    """

    def __init__(self, grads: Tensor, squares: Tensor | None = None) -> None:
        self.grads = grads
        self.squares = squares

    def squared_norms(self) -> Tensor:
        return squared_norms(self.grads) if self.squares is None else self.squares

    def weighted_sum(self, weights: Tensor) -> Tensor:
        return weighted_sum(self.grads, weights)

    def client_sums(self, weights: Tensor) -> Tensor:
        grads = _taken(self.grads.to(weights.dtype), weights)
        sums = weights[:, None] @ grads.reshape(*weights.shape, -1)  # (K, 1, P)
        return sums.view(len(weights), *grads.shape[1:])

    def whole(self) -> Tensor:
        return self.grads


class Outer:
    """Gradients sum_t g_t x_t^T of a linear layer's weight, from their two factors.

    The norms come from |sum_t g_t x_t^T|^2 = sum_ts (g_t.g_s)(x_t.x_s), which pays only when
    there are fewer tokens than rows and columns (`Outer.pays`).

    Args:
        x: inputs (N, T, i).
        g: gradients of the outputs (N, T, o).
    """

    def __init__(self, x: Tensor, g: Tensor) -> None:
        self.x = x
        self.g = g

    @staticmethod
    def pays(tokens: int, out: int, inp: int) -> bool:
        """Whether T x T products are fewer than the entries of o x i gradients."""
        return tokens <= min(out, inp)

    def squared_norms(self) -> Tensor:
        # in float64: terms that cancel must not make a long gradient look short
        x, g = self.x.double(), self.g.double()
        gram = (x @ x.mT) * (g @ g.mT)  # (N, T, T)
        return gram.sum((1, 2)).clamp_min(0).to(self.g.dtype)

    def weighted_sum(self, weights: Tensor) -> Tensor:
        x, g, taken = self.x, self.g, weights != 0
        if not bool(taken.all()):
            x, g, weights = x[taken], g[taken], weights[taken]
        scaled = g * weights[:, None, None]
        return scaled.flatten(0, 1).mT @ x.flatten(0, 1)

    def client_sums(self, weights: Tensor) -> Tensor:
        x, g = _taken(self.x, weights), _taken(self.g, weights)
        scaled = g * weights.view(-1, 1, 1)
        of_clients = (len(weights), -1)
        return scaled.reshape(*of_clients, g.shape[2]).mT @ x.reshape(*of_clients, x.shape[2])

    def whole(self) -> Tensor:
        return self.g.mT @ self.x


def clipped_sum(pieces: Mapping[str, Piece], clip: float) -> tuple[dict[str, Tensor], Tensor]:
    """sum_n g_n min(1, C / |g_n|) over all parameters together, and the norms |g_n| (N,).

    Abadi et al., "Deep Learning with Differential Privacy", https://arxiv.org/abs/1607.00133,
    algorithm 1. The norm is over all parameters of an example. An example whose gradient is
    not finite adds nothing.

    Args:
        pieces: parameter name -> its gradients; at least one.
        clip: C.
    """
    norms = _norms(pieces)
    weights = _weights(norms, clip)
    return {name: piece.weighted_sum(weights) for name, piece in pieces.items()}, norms


def clipped_client_sums(pieces: Mapping[str, Piece], clips: Sequence[float]) -> dict[str, Tensor]:
    """`clipped_sum` over the examples of every client by itself, (K, *shape) by parameter.

    Args:
        pieces: parameter name -> the gradients of as many examples of each client; at least one.
        clips: C of every client.
    """
    norms = _norms(pieces)
    weights = _weights(norms.view(len(clips), -1), norms.new_tensor(clips)[:, None])
    return {name: piece.client_sums(weights) for name, piece in pieces.items()}


def _norms(pieces: Mapping[str, Piece]) -> Tensor:
    return torch.stack([piece.squared_norms() for piece in pieces.values()]).sum(0).sqrt()


def _weights(norms: Tensor, clip: float | Tensor) -> Tensor:
    return torch.where(norms.isfinite(), (clip / (norms + 1e-6)).clamp_max(1.0), 0.0)


def _taken(values: Tensor, weights: Tensor) -> Tensor:
    """`values` (N, ...) with zeros for examples of weight 0: 0 times NaN is NaN."""
    taken = weights.flatten() != 0
    if bool(taken.all()):
        return values
    return values.where(taken.view(-1, *[1] * (values.dim() - 1)), 0.0)
