"""Gradients of single examples: by book-keeping, or by Opacus' hooks.

Both listen at the leaves (see `fedlora.adapters.leaves`): a leaf's input x and the gradient g
of its output give each example's gradient of its parameters. Book-keeping does so in place of
the summed gradient that the backward pass would compute, so a private step does hardly more
than a plain one; Bu et al., "Differentially Private Optimization on Large Model at Small
Cost", https://arxiv.org/abs/2210.00038, section 3.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import partial
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from fedlora.errors import TrainingError
from fedlora.ops.dp_lora_grads import sample_grads
from fedlora.privacy.grad_samplers import SAMPLERS, register_grad_samplers
from fedlora.privacy.pieces import Outer, Piece, Whole


class PerSample(ABC):
    """Inside the context, backward passes of a sum of losses leave gradients by example.

    Args:
        model: in training mode.
        parameters: everything that is trained, by name.

    Raises:
        TrainingError: a trained parameter that no leaf of a known kind owns.
    """

    def __init__(self, model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
        self.model = model
        self.parameters = parameters
        self.names = {id(parameter): name for name, parameter in parameters.items()}
        self.leaves = [
            module
            for module in model.modules()
            if any(id(p) in self.names for p in module.parameters(recurse=False))
        ]
        owned = {id(p) for leaf in self.leaves for p in leaf.parameters(recurse=False)}
        for name, parameter in parameters.items():
            if id(parameter) not in owned:
                raise TrainingError(
                    f"parameter {name} is trained but is no longer part of the model, so that no "
                    "example's gradient of it could be clipped; build the model and the adapter "
                    "again"
                )

    @abstractmethod
    def __enter__(self) -> Self: ...

    @abstractmethod
    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...

    @abstractmethod
    def begin(self, examples: int) -> None:
        """Forgets what is held; the next backward pass is of so many examples."""

    @abstractmethod
    def pieces(self) -> dict[str, Piece]:
        """What the last backward pass left, for every trained parameter.

        Raises:
            TrainingError: a parameter that the loss does not reach.
        """


class BookKeeping(PerSample):
    """Takes each example's gradient from the products of the backward pass.

    Trained parameters do not require gradients inside the context, so that the backward pass
    does not sum them; a tap behind every leaf sees x and g instead. A leaf that is called more
    than once, and weights shared between leaves, add up. Recomputation of activations is fine:
    what is seen are the gradients, once.
    """

    def __init__(self, model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
        super().__init__(model, parameters)
        if why := book_keeping_misfit(model, parameters):
            raise TrainingError(f"{why}; set privacy.per_sample = 'hooks'")
        self._examples = 0
        self._held: dict[str, Piece] = {}

    def __enter__(self) -> Self:
        for parameter in self.parameters.values():
            parameter.requires_grad_(False)
        # what a tap's output requires gradients for
        wake = torch.zeros((), device=next(iter(self.parameters.values())).device)
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
        for parameter in self.parameters.values():
            parameter.requires_grad_(True)

    def begin(self, examples: int) -> None:
        self._examples = examples
        self._held = {}

    def pieces(self) -> dict[str, Piece]:
        _need_all(self.names.values(), self._held)
        return {name: self._held[name] for name in self.parameters}

    def _take(self, leaf: nn.Module, inputs: tuple[Tensor, ...], g: Tensor) -> None:
        if g.shape[0] != self._examples:
            raise TrainingError(
                f"{type(leaf).__name__} of {self._owned(leaf)} has {g.shape[0]} rows in its first "
                f"dimension; expected one for each of the {self._examples} examples, without "
                "which no example's gradient can be told apart"
            )
        wide = torch.promote_types(g.dtype, torch.float32)
        if isinstance(leaf, nn.Linear):
            x, g = _tokens(inputs[-1]), _tokens(g)
            if (name := self.names.get(id(leaf.weight))) is not None:
                few = Outer.pays(x.shape[1], *leaf.weight.shape) and name not in self._held
                self._add(
                    name, Outer(x.to(wide), g.to(wide)) if few else Whole(*sample_grads(x, g))
                )
            if leaf.bias is not None and (name := self.names.get(id(leaf.bias))) is not None:
                self._add(name, Whole(g.to(wide).sum(1)))
            return
        grads = SAMPLERS[type(leaf)](leaf, tuple(x.to(wide) for x in inputs), g.to(wide))
        for parameter, held in grads.items():
            self._add(self.names[id(parameter)], Whole(held))

    def _add(self, name: str, piece: Piece) -> None:
        held = self._held.get(name)
        self._held[name] = piece if held is None else Whole(held.whole() + piece.whole())

    def _owned(self, leaf: nn.Module) -> str:
        return ", ".join(
            self.names[id(p)] for p in leaf.parameters(recurse=False) if id(p) in self.names
        )


class Hooks(PerSample):
    """Opacus' GradSampleModule: hooks, and samplers for every kind of leaf it knows or we add.

    https://github.com/pytorch/opacus/tree/main/opacus/grad_sample. Its hooks count a module
    object that sits in two places twice, and do not see modules whose activations are
    recomputed without re-entry; both are refused.
    """

    def __init__(self, model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
        super().__init__(model, parameters)
        if why := hooks_misfit(model, parameters):
            raise TrainingError(f"{why}; set privacy.per_sample = 'bookkeeping'")
        self._wrapped: Any = None

    def __enter__(self) -> Self:
        from opacus.grad_sample import GradSampleModule

        register_grad_samplers()
        self._wrapped = GradSampleModule(self.model, batch_first=True, loss_reduction="sum")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.begin(0)
        self._wrapped.to_standard_module()
        self._wrapped = None

    def begin(self, examples: int) -> None:
        for parameter in self.parameters.values():
            parameter.grad = None
            parameter.grad_sample = None  # type: ignore[attr-defined]

    def pieces(self) -> dict[str, Piece]:
        found: dict[str, Piece] = {}
        for name, parameter in self.parameters.items():
            grads = getattr(parameter, "grad_sample", None)
            if grads is not None:
                found[name] = Whole(grads.to(torch.promote_types(grads.dtype, torch.float32)))
        _need_all(self.names.values(), found)
        return found


MODES: Mapping[str, type[PerSample]] = {"bookkeeping": BookKeeping, "hooks": Hooks}


def per_sample(mode: str, model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> PerSample:
    """The way of `privacy.per_sample`; "auto" is book-keeping where it applies."""
    if mode == "auto":
        mode = "hooks" if book_keeping_misfit(model, parameters) else "bookkeeping"
    return MODES[mode](model, parameters)


def book_keeping_misfit(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> str:
    """Why book-keeping does not apply; empty if it does."""
    trained = {id(parameter) for parameter in parameters.values()}
    for path, module in model.named_modules():
        own = any(id(p) in trained for p in module.parameters(recurse=False))
        if own and not isinstance(module, nn.Linear) and type(module) not in SAMPLERS:
            return f"book-keeping does not know {type(module).__name__} ({path}), which is trained"
    return ""


def hooks_misfit(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> str:
    """Why Opacus' hooks would be wrong; empty if they are right."""
    trained = {id(parameter): name for name, parameter in parameters.items()}
    places: dict[int, str] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if not any(id(p) in trained for p in module.parameters(recurse=False)):
            continue
        if id(module) in places:
            return f"module {path} is the same object as {places[id(module)]}, hooked twice"
        places[id(module)] = path
    if getattr(model, "is_gradient_checkpointing", False):
        return "hooks do not see activations that are computed again (gradient checkpointing)"
    return ""


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


def _need_all(names: Any, found: Mapping[str, Piece]) -> None:
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
