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

from fedlora.ops.dropout_mask import Dropout


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


def dropped(x: Tensor, sizes: Sequence[int], dropout: Dropout | None) -> Tensor:
    """`x` (M, k) with zeros where entries are dropped; what survives is not scaled yet."""
    if dropout is None:
        return x
    kept = drawn(dropout, sizes, x).kept
    assert kept is not None
    return torch.where(kept, x, 0)


def drawn(dropout: Dropout, sizes: Sequence[int], like: Tensor) -> Dropout:
    """The same with its mask (M, k) for groups of these sizes, with device and k of `like`."""
    return dropout.drawn(*places(tuple(sizes), like.device), like.shape[-1])


def shrink(
    x: Tensor,
    a: Tensor,
    sizes: Sequence[int],
    dropout: Dropout | None,
    way: str,
    alpha: float = 1.0,
) -> Tensor:
    """S_i = alpha dropout(x_i) A_i^T for rows x (M, k) and factors (K, r, k); (M, r)."""
    return _shrink(dropped(x, sizes, dropout), a, sizes, way, _scale(dropout, alpha))


def expand_(
    y: Tensor,
    s: Tensor,
    b: Tensor,
    sizes: Sequence[int],
    dropout: Dropout | None,
    way: str,
    alpha: float = 1.0,
) -> None:
    """y_i += alpha dropout(s_i B_i^T) in place, for y (M, d), s (M, r) and factors (K, d, r)."""
    if dropout is None:
        _expand(y, s, b, sizes, way, alpha)
    else:
        change = torch.zeros_like(y)
        _expand(change, s, b, sizes, way, _scale(dropout, alpha))
        y += dropped(change, sizes, dropout)


def factor_grads(
    g: Tensor,
    x: Tensor,
    sizes: Sequence[int],
    dropout: Dropout | None,
    way: str,
    alpha: float = 1.0,
) -> Tensor:
    """Gives alpha g_i^T dropout(x_i) of rows g (M, r) and x (M, k); (K, r, k).

    It is zero for groups of no rows.
    """
    return _factor_grads(g, dropped(x, sizes, dropout), sizes, way, _scale(dropout, alpha))


def _scale(dropout: Dropout | None, alpha: float) -> float:
    return alpha if dropout is None else alpha * dropout.upscale


def _bmm(left: Tensor, right: Tensor, alpha: float) -> Tensor:
    """The batched product alpha left right in one pass."""
    if alpha == 1.0:
        return torch.bmm(left, right)
    return torch.baddbmm(left.new_zeros(()), left, right, beta=0.0, alpha=alpha)


def _shrink(x: Tensor, a: Tensor, sizes: Sequence[int], way: str, alpha: float) -> Tensor:
    if way == "grouped":
        return F.grouped_mm(x, a.mT, offs=_ends(tuple(sizes), x.device)) * alpha
    if way == "masked":
        clients, _ = places(tuple(sizes), x.device)
        every = (x @ a.flatten(0, 1).T).unflatten(1, a.shape[:2])  # (M, K, r)
        own: Tensor = every[torch.arange(len(x), device=x.device), clients]
        return own * alpha
    if way == "loop":
        s = x.new_empty(len(x), a.shape[1])
        for part, rows, factor in zip(s.split(list(sizes)), x.split(list(sizes)), a, strict=True):
            torch.addmm(part, rows, factor.T, beta=0.0, alpha=alpha, out=part)
        return s
    return _flat(_bmm(_deep(x, sizes), a.mT, alpha), sizes)


def _expand(y: Tensor, s: Tensor, b: Tensor, sizes: Sequence[int], way: str, alpha: float) -> None:
    if way == "grouped":
        # it takes no slice of a wider tensor
        change = F.grouped_mm(s.contiguous(), b.mT, offs=_ends(tuple(sizes), y.device))
        y.add_(change, alpha=alpha)
    elif way == "masked":
        y.addmm_(_wide(s, sizes), b.mT.flatten(0, 1), alpha=alpha)
    elif way == "loop":
        for out, rows, factor in zip(y.split(list(sizes)), s.split(list(sizes)), b, strict=True):
            out.addmm_(rows, factor.T, alpha=alpha)
    elif way == "bmm":
        deep = y.unflatten(0, (len(sizes), sizes[0]))
        deep.baddbmm_(_deep(s, sizes), b.mT, alpha=alpha)
    else:
        y.add_(_flat(torch.bmm(_deep(s, sizes), b.mT), sizes), alpha=alpha)


def _factor_grads(g: Tensor, x: Tensor, sizes: Sequence[int], way: str, alpha: float) -> Tensor:
    if way == "grouped":
        grads = F.grouped_mm(g.contiguous().T, x, offs=_ends(tuple(sizes), x.device)) * alpha
        # what a group of no rows gets is not documented
        for i in (i for i, size in enumerate(sizes) if size == 0):
            grads[i] = 0
        return grads
    if way == "masked":
        return (_wide(g, sizes).T @ x).view(len(sizes), -1, x.shape[1]) * alpha
    if way == "loop":
        grads = x.new_empty(len(sizes), g.shape[1], x.shape[1])
        for out, left, right in zip(grads, g.split(list(sizes)), x.split(list(sizes)), strict=True):
            torch.addmm(out, left.T, right, beta=0.0, alpha=alpha, out=out)
        return grads
    return _bmm(_deep(g, sizes).mT, _deep(x, sizes), alpha)


def _deep(x: Tensor, sizes: Sequence[int]) -> Tensor:
    """(M, k) as (K, n, k), with zero rows below those of a group of fewer than n."""
    if len(set(sizes)) == 1:
        whole: Tensor = x.unflatten(0, (len(sizes), sizes[0]))
        return whole
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
