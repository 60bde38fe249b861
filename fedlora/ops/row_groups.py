"""Products of groups of rows, each with a factor of its own.

Rows of several clients lie below one another, client after client; `sizes` says how many each
has, which may be none. One client is a single group.

Shapes: M rows, K groups, k columns, r rank. Every product has several ways; `choose` says which
is taken when. Dropout masks are those of `fedlora.ops.dropout_mask`. These are the plain torch
definitions, below autograd; `fedlora.ops.row_ops` has them as ops, with kernels beside them.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from fedlora.ops.dropout_mask import keep_mask, upscale


def choose(
    rank: int, widths: Sequence[int], sizes: Sequence[int], device: torch.device, dtype: torch.dtype
) -> str:
    """How the rows of `sizes` meet factors of rank `rank` and `widths`, without kernels of ours.

    Groups of one size are one batched product. On a GPU, others are one grouped product, if the
    number format and the alignment (16 bytes) allow it; else they are padded to the largest, if
    that at most doubles them. What is left, and everything on a CPU, is a loop over the clients.

    `masked`, one product of rank K r with the others' columns set to zero, is never chosen: there
    zero times a diverged client's infinity reaches the clients beside it. It is kept to compare
    with, and for factors that are known to be finite.
    """
    if len(set(sizes)) == 1:
        return "bmm"
    if device.type != "cuda":
        return "loop"
    aligned = all(size % 8 == 0 for size in (rank, *widths))
    if dtype == torch.bfloat16 and aligned and torch.cuda.get_device_capability(device) >= (8, 0):
        return "grouped"
    return "padded" if len(sizes) * max(sizes) <= 2 * sum(sizes) else "loop"


def dropped(x: Tensor, sizes: Sequence[int], keys: Tensor | None, rate: float) -> Tensor:
    """`x` (M, k) with zeros where `keys` (K,) drop; what survives is not scaled yet."""
    if keys is None:
        return x
    clients, rows = places(tuple(sizes), x.device)
    return torch.where(keep_mask(keys[clients], rows, x.shape[1], rate), x, 0)


def shrink(
    x: Tensor, a: Tensor, sizes: Sequence[int], keys: Tensor | None, rate: float, way: str
) -> Tensor:
    """S_i = dropout(x_i) A_i^T for rows x (M, k) and factors (K, r, k); (M, r)."""
    s = _shrink(dropped(x, sizes, keys, rate), a, sizes, way)
    return s if keys is None else s * upscale(rate)


def expand_(
    y: Tensor,
    s: Tensor,
    b: Tensor,
    sizes: Sequence[int],
    keys: Tensor | None,
    rate: float,
    way: str,
) -> None:
    """y_i += dropout(s_i B_i^T) in place, for y (M, d), s (M, r) and factors (K, d, r)."""
    if keys is None:
        _expand(y, s, b, sizes, way)
    else:
        change = torch.zeros_like(y)
        _expand(change, s * upscale(rate), b, sizes, way)
        y += dropped(change, sizes, keys, rate)


def factor_grads(
    g: Tensor, x: Tensor, sizes: Sequence[int], keys: Tensor | None, rate: float, way: str
) -> Tensor:
    """g_i^T dropout(x_i) of rows g (M, r) and x (M, k); (K, r, k), zero for groups of no rows."""
    if keys is not None:
        g = g * upscale(rate)
    return _factor_grads(g, dropped(x, sizes, keys, rate), sizes, way)


def _shrink(x: Tensor, a: Tensor, sizes: Sequence[int], way: str) -> Tensor:
    if way == "grouped":
        return F.grouped_mm(x, a.mT, offs=_ends(tuple(sizes), x.device))
    if way == "masked":
        clients, _ = places(tuple(sizes), x.device)
        every = (x @ a.flatten(0, 1).T).unflatten(1, a.shape[:2])  # (M, K, r)
        own: Tensor = every[torch.arange(len(x), device=x.device), clients]
        return own
    if way == "loop":
        s = x.new_empty(len(x), a.shape[1])
        for part, rows, factor in zip(s.split(list(sizes)), x.split(list(sizes)), a, strict=True):
            torch.mm(rows, factor.T, out=part)
        return s
    return _flat(torch.bmm(_deep(x, sizes), a.mT), sizes)


def _expand(y: Tensor, s: Tensor, b: Tensor, sizes: Sequence[int], way: str) -> None:
    if way == "grouped":
        y += F.grouped_mm(s, b.mT, offs=_ends(tuple(sizes), y.device))
    elif way == "masked":
        y.addmm_(_wide(s, sizes), b.mT.flatten(0, 1))
    elif way == "loop":
        for out, rows, factor in zip(y.split(list(sizes)), s.split(list(sizes)), b, strict=True):
            out.addmm_(rows, factor.T)
    elif way == "bmm":
        y.unflatten(0, (len(sizes), sizes[0])).baddbmm_(_deep(s, sizes), b.mT)
    else:
        y += _flat(torch.bmm(_deep(s, sizes), b.mT), sizes)


def _factor_grads(g: Tensor, x: Tensor, sizes: Sequence[int], way: str) -> Tensor:
    if way == "grouped":
        grads = F.grouped_mm(g.T, x, offs=_ends(tuple(sizes), x.device))
        # what a group of no rows gets is not documented
        for i in (i for i, size in enumerate(sizes) if size == 0):
            grads[i] = 0
        return grads
    if way == "masked":
        return (_wide(g, sizes).T @ x).view(len(sizes), -1, x.shape[1])
    if way == "loop":
        grads = x.new_empty(len(sizes), g.shape[1], x.shape[1])
        for out, left, right in zip(grads, g.split(list(sizes)), x.split(list(sizes)), strict=True):
            torch.mm(left.T, right, out=out)
        return grads
    return torch.bmm(_deep(g, sizes).mT, _deep(x, sizes))


def _deep(x: Tensor, sizes: Sequence[int]) -> Tensor:
    """(M, k) as (K, n, k), with zero rows below those of a group of fewer than n."""
    if len(set(sizes)) == 1:
        return x.reshape(len(sizes), sizes[0], x.shape[1])
    clients, rows = places(tuple(sizes), x.device)
    deep = x.new_zeros(len(sizes), max(sizes), x.shape[1])
    deep[clients, rows] = x
    return deep


def _flat(deep: Tensor, sizes: Sequence[int]) -> Tensor:
    """(K, n, k) as (M, k): `_deep` the other way."""
    if len(set(sizes)) == 1:
        return deep.flatten(0, 1)
    return deep[places(tuple(sizes), deep.device)]


def _wide(s: Tensor, sizes: Sequence[int]) -> Tensor:
    """(M, r) as (M, K r): every row in the columns of its own group, zeros beside it."""
    clients, _ = places(tuple(sizes), s.device)
    wide = s.new_zeros(len(s), len(sizes), s.shape[1])
    wide[torch.arange(len(s), device=s.device), clients] = s
    return wide.flatten(1)


@lru_cache(maxsize=64)
def places(sizes: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Group of every row, and its number there, both int64 (M,)."""
    counts = torch.tensor(sizes, device="cpu")
    clients = torch.repeat_interleave(counts)
    starts = counts.cumsum(0) - counts
    rows = torch.arange(len(clients), device="cpu") - starts[clients]
    return clients.to(device), rows.to(device)


@lru_cache(maxsize=64)
def _ends(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    ends = torch.tensor(sizes, device="cpu").cumsum(0, dtype=torch.int32)
    return ends.to(device)
