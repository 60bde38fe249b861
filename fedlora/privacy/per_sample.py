"""Gradients of single examples: by book-keeping, or by Opacus' hooks.

Both listen at the leaves (see `fedlora.adapters.leaves`): a leaf's input x and the gradient g
of its output give each example's gradient of its parameters.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

import torch
from torch import nn

from fedlora.errors import TrainingError
from fedlora.privacy.grad_samplers import SAMPLERS, register_grad_samplers
from fedlora.privacy.pieces import Piece, Whole
from fedlora.privacy.taps import Taps, need_all


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


class BookKeeping(Taps, PerSample):
    """Takes each example's gradient from the products of the backward pass; see `Taps`.

    Trained parameters do not require gradients inside the context, so that the backward pass
    does not sum them.
    """

    def __init__(self, model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
        PerSample.__init__(self, model, parameters)
        if why := book_keeping_misfit(model, parameters):
            raise TrainingError(f"{why}; set privacy.per_sample = 'hooks'")
        Taps.__init__(self, self.leaves, next(iter(parameters.values())).device)

    def __enter__(self) -> Self:
        for parameter in self.parameters.values():
            parameter.requires_grad_(False)
        return Taps.__enter__(self)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        Taps.__exit__(self, kind, error, trace)
        for parameter in self.parameters.values():
            parameter.requires_grad_(True)

    def pieces(self) -> dict[str, Piece]:
        return self.held(self.parameters)

    def owned(self, leaf: nn.Module) -> dict[str, str]:
        return {
            own: self.names[id(parameter)]
            for own, parameter in leaf.named_parameters(recurse=False)
            if id(parameter) in self.names
        }


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
        need_all(self.parameters, found)
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
