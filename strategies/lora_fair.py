"""LoRA-FAIR: the factors are averaged, then B is corrected towards the mean of products.

Bian et al., "LoRA-FAIR: Federated LoRA Fine-Tuning with Aggregation and Initialization
Refinement", https://arxiv.org/abs/2411.14961, section 4.

With means B and A and the mean of products T = sum_i p_i B_i A_i, a correction dB makes
(B + dB) A resemble T while a penalty keeps B + dB a good start for the next round. A stays as
averaged. T enters only through P = T A^T (d, r), which is summed client by client once A is
known, and its norm.

Two solvers:

- "ridge": min ||T - (B + dB) A||_F^2 + mu ||dB||_F^2 with mu = lambda_rel tr(G) / r and
  G = A A^T, in closed form: dB = (P - B G) (G + mu I)^-1. Not the paper's objective, but
  its scale does not depend on that of the factors, and it cannot fail to converge.
- "cosine": the paper's, min 1 - cos(T, (B + dB) A) + lambda ||dB||_F by gradient descent from
  dB = 0 (`fedlora.strategies.fair_cosine`).

Differs from the paper: unequal ranks are padded with zeros for the means, P is that of the
clients' own factors, and each client receives the leading slots of the result.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from fedlora.adapter import MethodTraits
from fedlora.errors import ConfigError
from fedlora.linalg import fill_dead, product_norm, project
from fedlora.seeds import generator
from fedlora.strategies.base import Stats, Strategy, StrategyState, Updates, bilinear
from fedlora.strategies.fair_cosine import Problem, solve_cosine

SOLVERS = ("ridge", "cosine")
PROJECTED = "projected."
# eigenvalues of G below this share of the largest are rounding
_NOISE = 1e-12


class LoraFair(Strategy):
    """Mean factors with B corrected towards the mean of products.

    Options:
        solver: "ridge" or "cosine".
        lambda_rel: weight of the ridge penalty, relative to the mean eigenvalue of A A^T.
        lambda: weight of the cosine solver's penalty, relative to ||B||.
        iterations: most steps of the cosine solver.
        rate: its step size.
        rescale: give its result, whose length the cosine does not see, the best one.
    """

    name = "lora-fair"
    exact = False
    linear = False
    hetero_rank = True
    needs = "product"
    options: ClassVar[Mapping[str, Any]] = {
        "solver": "ridge",
        "lambda_rel": 0.5,
        "lambda": 0.01,
        "iterations": 1000,
        "rate": 0.01,
        "rescale": False,
    }

    def __init__(self, traits: MethodTraits, options: Mapping[str, Any] | None = None) -> None:
        super().__init__(traits, options)
        place = "federation.strategy_options"
        if self.settings["solver"] not in SOLVERS:
            raise ConfigError(
                f"{place}.solver = {self.settings['solver']!r}; expected "
                f"{' or '.join(map(repr, SOLVERS))}"
            )
        for key in ("lambda_rel", "lambda", "iterations", "rate"):
            if not self.settings[key] >= 0:
                raise ConfigError(f"{place}.{key} = {self.settings[key]}; expected 0 or more")

    def factors(self, state: StrategyState) -> tuple[str, ...]:
        return tuple(sorted(bilinear(self.traits)))

    def reduce(self, state: StrategyState, updates: Updates) -> Stats:
        """Sums of the factors and, once the mean of A is known, of B_i (A_i A^T) per layer."""
        sums = self.sums(state, updates)
        weight = sum(update.weight for update in updates)
        _, other = bilinear(self.traits)
        for layer in state.spec.layers:
            rows = sums[f"{layer.name}.{other}"] / weight
            seen = torch.zeros(layer.out, layer.rank, dtype=torch.float64)
            for update in updates:
                left, right = self.product(update, layer.name)
                seen += project(left, right, rows) * (update.weight / layer.scale)
            sums[PROJECTED + layer.name] = seen
        stacks = self.stacks(state, updates) if self.settings["solver"] == "cosine" else {}
        return Stats(sums, weight, stacks)

    def refactor(self, state: StrategyState, stats: Stats) -> StrategyState:
        means = stats.mean()
        zero, other = bilinear(self.traits)
        problems = {}
        for layer in state.spec.layers:
            b, a = means[f"{layer.name}.{zero}"], means[f"{layer.name}.{other}"]
            norm = 0.0
            if layer.name in stats.stacks:
                norm = product_norm(*stats.stacks[layer.name]) / layer.scale
            problems[layer.name] = Problem(b, a @ a.T, means[PROJECTED + layer.name], norm)
        tensors = {name: means[name].float() for name in means if not name.startswith(PROJECTED)}
        corrected = self._solve(problems)
        for layer in state.spec.layers:
            b_name, a_name = f"{layer.name}.{zero}", f"{layer.name}.{other}"
            # slots that no client of the round holds; a new row of A changes no product
            draws = generator(state.spec.seed, self.name, state.round + 1, layer.name)
            b = corrected[layer.name].float()
            tensors[b_name], tensors[a_name] = fill_dead(b, tensors[a_name], draws)
        return self.advance(state, tensors)

    def _solve(self, problems: Mapping[str, Problem]) -> dict[str, Tensor]:
        """Layer -> the corrected B (d, r), float64."""
        chosen = self.settings
        if chosen["solver"] == "ridge":
            return {name: solve_ridge(p, chosen["lambda_rel"]) for name, p in problems.items()}
        return solve_cosine(
            problems,
            penalty=chosen["lambda"],
            rate=chosen["rate"],
            iterations=chosen["iterations"],
            rescale=chosen["rescale"],
        )


def solve_ridge(problem: Problem, relative: float) -> Tensor:
    """B + (P - B G) (G + mu I)^-1 with mu = relative * tr(G) / r.

    By the eigenvectors of G, so that with mu = 0 and dependent rows of A the directions that
    A does not have, in which the objective is flat, stay as they are in B.
    """
    values, vectors = torch.linalg.eigh(problem.gram)  # (r,), (r, r)
    shifted = values + relative * values.mean()
    inverse = torch.where(shifted > _NOISE * values.max(), 1 / shifted, 0.0)
    gap = problem.projected - problem.mean @ problem.gram  # (d, r)
    correction: Tensor = ((gap @ vectors) * inverse) @ vectors.T
    return problem.mean + correction
