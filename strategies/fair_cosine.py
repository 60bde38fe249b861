"""The cosine solver of LoRA-FAIR, with neither d nor k in its iterations.

Minimises, over X = B + dB (d, r) and for every layer,

    1 - cos(T, X A) + lambda ||X - B||_F,

    cos = <P, X> / (t q),  P = T A^T,  t = ||T||_F,  q^2 = ||X A||_F^2 = <X G, X>,  G = A A^T,
    gradient of cos = P / (t q) - <P, X> / (t q^3) X G.

All lengths are divided by ||B||_F first, so that one step size suits all layers. Gradients lie
in the column space of [B | P], so the descent happens in its 2 r coordinates and is the one in
d but for rounding; all layers take their steps together.

The penalty is not squared, so it has no gradient at dB = 0, and steps along it would swing
about that point for ever. Each step therefore follows the gradient of the cosine and then
shrinks dB by rate * lambda, to zero if it is shorter (proximal gradient descent; Parikh and
Boyd, "Proximal Algorithms", 2014, sections 4.2 and 6.5.1), which has the same minimum.

Bian et al., https://arxiv.org/abs/2411.14961, section 4.2. The cosine is that of the flattened
matrices.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

_STOP = 1e-6


@dataclass(frozen=True)
class Problem:
    """One layer: what B is to be corrected towards.

    Attributes:
        mean: B, the mean of the clients' B_i (d, r), float64.
        gram: G = A A^T (r, r) of the mean A.
        projected: P = T A^T (d, r).
        norm: t = ||T||_F.
    """

    mean: Tensor
    gram: Tensor
    projected: Tensor
    norm: float


def solve_cosine(
    problems: Mapping[str, Problem],
    *,
    penalty: float,
    rate: float,
    iterations: int,
    rescale: bool,
) -> dict[str, Tensor]:
    """Layer -> the corrected B (d, r).

    Where B, T or their products with A are zero the cosine is not defined, and B stays.

    Args:
        problems: by layer.
        penalty: lambda.
        rate: step size of gradient descent.
        iterations: most steps; a layer stops when a step moves it by less than 1e-6 of its
            norm.
        rescale: multiply the result by <P, X> / <X G, X>, which makes ||T - X A||_F least.
    """
    solved = {name: problem.mean for name, problem in problems.items()}
    alike: dict[int, list[str]] = {}
    for name, problem in problems.items():
        reach = (problem.mean @ problem.gram * problem.mean).sum()
        if problem.norm > 0 and float(reach) > 0:
            alike.setdefault(problem.gram.shape[0], []).append(name)
    for rank, names in alike.items():
        bases, starts, aims = [], [], []
        for name in names:
            problem = problems[name]
            basis, both = torch.linalg.qr(torch.cat([problem.mean, problem.projected], 1))
            inside = torch.zeros(2 * rank, 2 * rank, dtype=torch.float64)
            inside[: both.shape[0]] = both / problem.mean.norm()
            bases.append(basis)
            starts.append(inside[:, :rank])
            aims.append(inside[:, rank:])
        grams = torch.stack([problems[name].gram for name in names])
        norms = torch.stack([problems[n].norm / problems[n].mean.norm() for n in names])
        found = _descend(
            torch.stack(starts), grams, torch.stack(aims), norms, penalty, rate, iterations
        )
        for name, basis, x in zip(names, bases, found, strict=True):
            problem = problems[name]
            result = basis @ x[: basis.shape[1]] * problem.mean.norm()
            if rescale:
                reach = (result @ problem.gram * result).sum()
                result = result * ((problem.projected * result).sum() / reach)
            solved[name] = result
    return solved


def gap_and_gradient(x: Tensor, gram: Tensor, aim: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
    """1 - cos(T, X A) (m,) of m layers and its gradient (m, rows, r).

    Args:
        x, aim: X and P (m, rows, r).
        gram: G (m, r, r).
        norm: t (m,).
    """
    reached = x @ gram
    along = (aim * x).sum((1, 2))  # (m,)
    length = (reached * x).sum((1, 2)).sqrt()
    gradient = (along / (norm * length**3))[:, None, None] * reached
    gradient = gradient - aim / (norm * length)[:, None, None]
    return 1 - along / (norm * length), gradient


def _descend(
    start: Tensor,
    gram: Tensor,
    aim: Tensor,
    norm: Tensor,
    penalty: float,
    rate: float,
    iterations: int,
) -> Tensor:
    x = start
    moving = torch.ones(x.shape[0], 1, 1, dtype=torch.bool)
    for _ in range(iterations):
        _, gradient = gap_and_gradient(x, gram, aim, norm)
        moved = x - rate * gradient - start
        distance = torch.linalg.matrix_norm(moved, keepdim=True)  # (m, 1, 1)
        kept = torch.where(distance > rate * penalty, 1 - rate * penalty / distance, 0.0)
        new = torch.where(moving, start + kept * moved, x)
        change = torch.linalg.matrix_norm(new - x, keepdim=True)
        moving = moving & (change > _STOP * torch.linalg.matrix_norm(x, keepdim=True))
        x = new
        if not bool(moving.any()):
            break
    return x
