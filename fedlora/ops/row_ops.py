"""The products of `fedlora.ops.row_groups` as torch ops, each with a Triton kernel beside it.

They have no derivatives: the autograd functions of this package call them in both directions.
Defined on a bare `torch.library.Library`, an op costs a call of it 16 microseconds on one core;
with what `torch.library.custom_op` adds, 35.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fedlora.ops import row_groups
from fedlora.ops.dropout_mask import NO_DROPOUT, Dropout, Settings
from fedlora.ops.registry import uses_triton

_LIBRARY = torch.library.Library("fedlora", "FRAGMENT")
_ROWS = "SymInt[] sizes, Tensor? keys, float rate, SymInt tokens, int stream, str way, float alpha"
_LIBRARY.define(f"row_shrink(Tensor x, Tensor a, {_ROWS}) -> Tensor")
_LIBRARY.define(f"row_expand_(Tensor(y!) y, Tensor s, Tensor b, {_ROWS}) -> ()")
_LIBRARY.define(f"row_factor_grads(Tensor g, Tensor x, {_ROWS}) -> Tensor")

TRITON = "triton"
_Masking = tuple[Tensor | None, float, int, int]


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


def mask_for(
    keys: Tensor | None,
    settings: Settings,
    kept: Tensor | None,
    sizes: Sequence[int],
    factors: Tensor,
    way: str,
) -> Dropout | None:
    """The dropout of one direction of an op, with its mask unless kernels (or nobody) make it.

    Args:
        keys: (K,), or None where nothing is dropped.
        settings: see `Dropout.settings`.
        kept: what `to_keep` gave in the other direction.
        sizes: rows of each group.
        factors: (..., k), of the masked side.
        way: how rows meet factors.
    """
    if keys is None:
        return None
    rate, tokens, stream = settings
    dropout = Dropout(rate, keys, tokens, stream, kept)
    if way == TRITON or factors.is_meta or torch.compiler.is_compiling():
        return dropout
    return row_groups.drawn(dropout, sizes, factors)


def to_keep(dropout: Dropout | None) -> Tensor | None:
    """The mask, if it is kept from forward to backward instead of drawn again.

    On a processor drawing takes as long as a product with the masked input, and memory is cheap.
    """
    if dropout is None or dropout.kept is None or dropout.kept.device.type != "cpu":
        return None
    return dropout.kept


def shrink(
    x: Tensor,
    a: Tensor,
    sizes: Sequence[int],
    dropout: Dropout | None,
    way: str,
    alpha: float = 1.0,
) -> Tensor:
    """See `row_groups.shrink`."""
    if _direct(dropout, way):
        return row_groups.shrink(x, a, sizes, dropout, way, alpha)
    made: Tensor = torch.ops.fedlora.row_shrink(x, a, sizes, *_masking(dropout), way, alpha)
    return made


def expand_(
    y: Tensor,
    s: Tensor,
    b: Tensor,
    sizes: Sequence[int],
    dropout: Dropout | None,
    way: str,
    alpha: float = 1.0,
) -> None:
    """See `row_groups.expand_`."""
    if _direct(dropout, way):
        row_groups.expand_(y, s, b, sizes, dropout, way, alpha)
    else:
        torch.ops.fedlora.row_expand_(y, s, b, sizes, *_masking(dropout), way, alpha)


def factor_grads(
    g: Tensor,
    x: Tensor,
    sizes: Sequence[int],
    dropout: Dropout | None,
    way: str,
    alpha: float = 1.0,
) -> Tensor:
    """See `row_groups.factor_grads`."""
    if _direct(dropout, way):
        return row_groups.factor_grads(g, x, sizes, dropout, way, alpha)
    made: Tensor = torch.ops.fedlora.row_factor_grads(g, x, sizes, *_masking(dropout), way, alpha)
    return made


def _direct(dropout: Dropout | None, way: str) -> bool:
    """Whether nothing but products of torch is meant, which need no op around them."""
    return way != TRITON and (dropout is None or dropout.kept is not None)


def _masking(dropout: Dropout | None) -> _Masking:
    return (None, *NO_DROPOUT) if dropout is None else (dropout.key, *dropout.settings)


def _dropout(masking: _Masking) -> Dropout | None:
    keys, rate, tokens, stream = masking
    return None if keys is None else Dropout(rate, keys, tokens, stream)


def _shrink(
    x: Tensor,
    a: Tensor,
    sizes: Sequence[int],
    keys: Tensor | None,
    rate: float,
    tokens: int,
    stream: int,
    way: str,
    alpha: float,
) -> Tensor:
    dropout = _dropout((keys, rate, tokens, stream))
    if way == TRITON:
        from fedlora.ops.kernels.shrink import shrink as kernel

        return kernel(x, a, sizes, dropout, alpha)
    return row_groups.shrink(x, a, sizes, dropout, way, alpha)


def _expand_(
    y: Tensor,
    s: Tensor,
    b: Tensor,
    sizes: Sequence[int],
    keys: Tensor | None,
    rate: float,
    tokens: int,
    stream: int,
    way: str,
    alpha: float,
) -> None:
    dropout = _dropout((keys, rate, tokens, stream))
    if way == TRITON:
        from fedlora.ops.kernels.expand import expand_ as kernel

        kernel(y, s, b, sizes, dropout, alpha)
    else:
        row_groups.expand_(y, s, b, sizes, dropout, way, alpha)


def _factor_grads(
    g: Tensor,
    x: Tensor,
    sizes: Sequence[int],
    keys: Tensor | None,
    rate: float,
    tokens: int,
    stream: int,
    way: str,
    alpha: float,
) -> Tensor:
    dropout = _dropout((keys, rate, tokens, stream))
    if way == TRITON:
        from fedlora.ops.kernels.factor_grads import factor_grads as kernel

        return kernel(g, x, sizes, dropout, alpha)
    return row_groups.factor_grads(g, x, sizes, dropout, way, alpha)


def _fake_shrink(x: Tensor, a: Tensor, *_: object) -> Tensor:
    return x.new_empty(x.shape[0], a.shape[1])


def _fake_expand_(*_: object) -> None:
    return None


def _fake_factor_grads(g: Tensor, x: Tensor, sizes: Sequence[int], *_: object) -> Tensor:
    return x.new_empty(len(sizes), g.shape[1], x.shape[1])


for _name, _made, _fake in (
    ("row_shrink", _shrink, _fake_shrink),
    ("row_expand_", _expand_, _fake_expand_),
    ("row_factor_grads", _factor_grads, _fake_factor_grads),
):
    _LIBRARY.impl(_name, _made, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fedlora::{_name}", _fake, lib=_LIBRARY)
