"""A guard against forming d x k matrices: low-rank code runs inside it or raises."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class DenseTensorError(AssertionError):
    """An operation gave a tensor as large as the guard forbids."""


class forbid_dense(TorchDispatchMode):  # type: ignore[no-untyped-call]  # noqa: N801
    """Inside, no operation may give a tensor of `numel` elements or more.

    Views and broadcasts count with their full size: what makes one may go on to copy it.
    """

    def __init__(self, numel: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.numel = numel

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and leaf.numel() >= self.numel:
                raise DenseTensorError(f"{func} gave {tuple(leaf.shape)}")
        return out
