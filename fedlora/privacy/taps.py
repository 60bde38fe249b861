"""Taps: book-keeping of examples' gradients at the leaves, whoever's values a leaf holds.

A leaf's input x and the gradient g of its output give each example's gradient of what the leaf
holds, in place of the summed gradient that the backward pass would compute, so that a private
step does hardly more than a plain one; Bu et al., "Differentially Private Optimization on Large
Model at Small Cost", https://arxiv.org/abs/2210.00038, section 3.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from fedlora.adapters.stacked_leaves import StackedLinear
from fedlora.errors import TrainingError
from fedlora.ops.dp_lora_grads import sample_grads
from fedlora.privacy.grad_samplers import SAMPLERS, STACKED_SAMPLERS
from fedlora.privacy.pieces import Outer, Piece, Whole

_SAMPLERS = {**SAMPLERS, **STACKED_SAMPLERS}


class Taps(ABC):
    """Inside the context, backward passes of a sum of losses leave gradients by example.

    A tap behind every leaf sees x and g. A leaf that is called more than once, and values shared
    between leaves, add up. Recomputation of activations is fine: what is seen are the gradients,
    once. What is tapped must not require gradients itself, or it is also summed.

    Args:
        leaves: linear ones, and those of `grad_samplers`, single or stacked.
        device: of what they hold.
    """

    def __init__(self, leaves: list[nn.Module], device: torch.device) -> None:
        self.leaves = leaves
        self._device = device
        self._examples = 0
        self._held: dict[str, Piece] = {}

    @abstractmethod
    def owned(self, leaf: nn.Module) -> Mapping[str, str]:
        """What is trained of a leaf: "weight" or "bias" -> full name."""

    def __enter__(self) -> Self:
        # what a tap's output requires gradients for
        wake = torch.zeros((), device=self._device)
        wake.requires_grad_(True)
        for leaf in self.leaves:
            # an attribute of the object goes before the method of its class
            vars(leaf)["forward"] = partial(_tapped, leaf, leaf.forward, wake, self._take)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for leaf in self.leaves:
            vars(leaf).pop("forward", None)

    def begin(self, examples: int) -> None:
        """Forgets what is held; the next backward pass is of so many examples."""
        self._examples = examples
        self._held = {}

    def held(self, names: Iterable[str]) -> dict[str, Piece]:
        """What the last backward pass left of these.

        Raises:
            TrainingError: the loss does not reach one of them.
        """
        names = list(names)
        need_all(names, self._held)
        return {name: self._held[name] for name in names}

    def _take(self, leaf: nn.Module, inputs: tuple[Tensor, ...], g: Tensor) -> None:
        names = self.owned(leaf)
        if g.shape[0] != self._examples:
            raise TrainingError(
                f"{type(leaf).__name__} of {', '.join(names.values())} has {g.shape[0]} rows in "
                f"its first dimension; expected one for each of the {self._examples} examples, "
                "without which no example's gradient can be told apart"
            )
        wide = torch.promote_types(g.dtype, torch.float32)
        if isinstance(leaf, nn.Linear | StackedLinear):
            x, g = _tokens(inputs[-1]), _tokens(g)
            if (name := names.get("weight")) is not None:
                few = Outer.pays(x.shape[1], g.shape[2], x.shape[2]) and name not in self._held
                self._add(
                    name, Outer(x.to(wide), g.to(wide)) if few else Whole(*sample_grads(x, g))
                )
            if (name := names.get("bias")) is not None:
                self._add(name, Whole(g.to(wide).sum(1)))
            return
        found = _SAMPLERS[type(leaf)](leaf, tuple(x.to(wide) for x in inputs), g.to(wide))
        if (name := names.get("weight")) is not None:
            (grads,) = found.values()
            self._add(name, Whole(grads))

    def _add(self, name: str, piece: Piece) -> None:
        held = self._held.get(name)
        self._held[name] = piece if held is None else Whole(held.whole() + piece.whole())


class _Tap(torch.autograd.Function):
    """The identity on y; on the way back it hands over x and the gradient of y."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, wake: Tensor, hand: Callable[..., None], *x: Tensor) -> Tensor:
        ctx.hand = hand
        ctx.save_for_backward(*x)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # only once: where activations are recomputed, a second look is an error
        saved = ctx.saved_tensors
        ctx.hand(saved, grads[0])
        return (grads[0], *(None for _ in range(2 + len(saved))))


def _tapped(
    leaf: nn.Module,
    forward: Callable[..., Tensor],
    wake: Tensor,
    take: Callable[[nn.Module, tuple[Tensor, ...], Tensor], None],
    *inputs: Tensor,
) -> Tensor:
    y = forward(*inputs)
    detached = (x.detach() for x in inputs)
    return _Tap.apply(y, wake, partial(take, leaf), *detached)  # type: ignore[no-any-return, no-untyped-call]


def need_all(names: Iterable[str], found: Mapping[str, Piece]) -> None:
    """Refuses what is trained without gradients.

    Raises:
        TrainingError: a name that nothing was found for.
    """
    missing = sorted(set(names) - set(found))
    if missing:
        raise TrainingError(
            f"the loss does not reach {missing[0]} ({len(missing)} trained parameters in all), so "
            "that noise alone would move it; train only what the model uses, or build the "
            "adapter again if the model was changed after it"
        )


def _tokens(x: Tensor) -> Tensor:
    """(N, ..., f) -> (N, T, f)."""
    return x.unsqueeze(1) if x.dim() == 2 else x.flatten(1, -2)
