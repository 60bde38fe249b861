"""The products of `fedlora.ops.row_groups` as torch ops, each with a Triton kernel beside it.

They have no derivatives: the autograd functions of this package call them in both directions.
Defined on a bare `torch.library.Library`, an op costs a call of it 16 microseconds on one core;
with what `torch.library.custom_op` adds, 35.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fedlora.ops import row_groups
from fedlora.ops.registry import uses_triton

_LIBRARY = torch.library.Library("fedlora", "FRAGMENT")
_ROWS = "SymInt[] sizes, Tensor? keys, float rate, str way"
_LIBRARY.define(f"row_shrink(Tensor x, Tensor a, {_ROWS}) -> Tensor")
_LIBRARY.define(f"row_expand_(Tensor(y!) y, Tensor s, Tensor b, {_ROWS}) -> ()")
_LIBRARY.define(f"row_factor_grads(Tensor g, Tensor x, {_ROWS}) -> Tensor")

TRITON = "triton"


def way_of(
    x: Tensor, rank: int, widths: Sequence[int], sizes: Sequence[int], *, masked: bool
) -> str:
    """How rows `x` meet their factors: by our kernels where they win, else `row_groups.choose`.

    Groups of one size are left to the batched product of the vendor, unless entries are dropped.
    """
    kernels = uses_triton(x) and x.dtype != torch.float64
    if kernels and (masked or len(set(sizes)) > 1):
        return TRITON
    return row_groups.choose(rank, widths, sizes, x.device, x.dtype)


def shrink(
    x: Tensor, a: Tensor, sizes: Sequence[int], keys: Tensor | None, rate: float, way: str
) -> Tensor:
    """See `row_groups.shrink`."""
    if _direct(keys, way):
        return row_groups.shrink(x, a, sizes, None, rate, way)
    made: Tensor = torch.ops.fedlora.row_shrink(x, a, sizes, keys, rate, way)
    return made


def expand_(
    y: Tensor,
    s: Tensor,
    b: Tensor,
    sizes: Sequence[int],
    keys: Tensor | None,
    rate: float,
    way: str,
) -> None:
    """See `row_groups.expand_`."""
    if _direct(keys, way):
        row_groups.expand_(y, s, b, sizes, None, rate, way)
    else:
        torch.ops.fedlora.row_expand_(y, s, b, sizes, keys, rate, way)


def factor_grads(
    g: Tensor, x: Tensor, sizes: Sequence[int], keys: Tensor | None, rate: float, way: str
) -> Tensor:
    """See `row_groups.factor_grads`."""
    if _direct(keys, way):
        return row_groups.factor_grads(g, x, sizes, None, rate, way)
    made: Tensor = torch.ops.fedlora.row_factor_grads(g, x, sizes, keys, rate, way)
    return made


def _direct(keys: Tensor | None, way: str) -> bool:
    """Whether nothing but products of torch is meant, which need no op around them."""
    return keys is None and way != TRITON


def _shrink(
    x: Tensor, a: Tensor, sizes: Sequence[int], keys: Tensor | None, rate: float, way: str
) -> Tensor:
    if way == TRITON:
        from fedlora.ops.kernels.shrink import shrink as kernel

        return kernel(x, a, sizes, keys, rate)
    return row_groups.shrink(x, a, sizes, keys, rate, way)


def _expand_(
    y: Tensor,
    s: Tensor,
    b: Tensor,
    sizes: Sequence[int],
    keys: Tensor | None,
    rate: float,
    way: str,
) -> None:
    if way == TRITON:
        from fedlora.ops.kernels.expand import expand_ as kernel

        kernel(y, s, b, sizes, keys, rate)
    else:
        row_groups.expand_(y, s, b, sizes, keys, rate, way)


def _factor_grads(
    g: Tensor, x: Tensor, sizes: Sequence[int], keys: Tensor | None, rate: float, way: str
) -> Tensor:
    if way == TRITON:
        from fedlora.ops.kernels.factor_grads import factor_grads as kernel

        return kernel(g, x, sizes, keys, rate)
    return row_groups.factor_grads(g, x, sizes, keys, rate, way)


def _fake_shrink(
    x: Tensor, a: Tensor, sizes: Sequence[int], keys: Tensor | None, rate: float, way: str
) -> Tensor:
    return x.new_empty(x.shape[0], a.shape[1])


def _fake_expand_(
    y: Tensor,
    s: Tensor,
    b: Tensor,
    sizes: Sequence[int],
    keys: Tensor | None,
    rate: float,
    way: str,
) -> None:
    return None


def _fake_factor_grads(
    g: Tensor, x: Tensor, sizes: Sequence[int], keys: Tensor | None, rate: float, way: str
) -> Tensor:
    return x.new_empty(len(sizes), g.shape[1], x.shape[1])


for _name, _made, _fake in (
    ("row_shrink", _shrink, _fake_shrink),
    ("row_expand_", _expand_, _fake_expand_),
    ("row_factor_grads", _factor_grads, _fake_factor_grads),
):
    _LIBRARY.impl(_name, _made, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fedlora::{_name}", _fake, lib=_LIBRARY)
