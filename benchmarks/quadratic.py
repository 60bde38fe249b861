"""A federated quadratic with known answers: which mechanism of a strategy wins where.

    python benchmarks/quadratic.py

Ten clients fit s B A, on a base that starts at zero, to their own (32, 24) matrix
M_i = W + h D_i with sum_i D_i = 0 by plain gradient descent in both factors at once. W and
D_i are random of rank r*, with norm sqrt(32) and mean norm sqrt(32). The figure is
||W_global - W||_F / ||W||_F after 40 rounds of tau steps at rate 0.05, all clients in every
round. Clients compute in float64; broadcast, mean and next state are those of the strategy.

It separates mechanisms and does not predict the accuracy of a task: real losses have many
minima, where a frozen A costs little. Writes the table into --out; takes a minute or two.
"""

import argparse
import math
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedlora.adapter import AdapterSpec, AdapterState, LayerSpec
from fedlora.adapters import METHODS
from fedlora.adapters.lora import kaiming_uniform
from fedlora.messages import ClientUpdate, Start
from fedlora.server.machine import machine
from fedlora.strategies import STRATEGIES
from fedlora.strategies.base import ClientInfo

D, K, N = 32, 24, 10
A, B = "w.A", "w.B"
# rank of the answer, rank of the adapter, heterogeneity h, local steps tau
SETTINGS = ((4, 4, 0.0, 5), (4, 4, 1.0, 5), (4, 4, 1.0, 20), (4, 4, 2.0, 20))
SETTINGS += ((8, 4, 0.0, 20), (8, 4, 2.0, 20))
# those that train A and B of every client and end with one global model
COMPARED = ("fedit", "ffa-lora", "fedsvd", "rolora", "lora-fair", "flexlora", "lora-lego")
COMPARED += ("fedex-lora", "flora")


def gauss(*shape: int, seed: int) -> Tensor:
    draws = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=draws, dtype=torch.float64)


def low_rank(rank: int, seed: int) -> Tensor:
    """A random (D, K) matrix of this rank with Frobenius norm sqrt(D)."""
    matrix = gauss(D, rank, seed=seed) @ gauss(rank, K, seed=seed + 1)
    return matrix * (D**0.5 / matrix.norm())


def targets(h: float, seed: int, rank: int = 4) -> tuple[Tensor, Tensor]:
    """(W, M (N, D, K)): what the federation and what each client wants."""
    common = low_rank(rank, 10_000 + seed)
    own = torch.stack([low_rank(rank, 20_000 + 100 * seed + 2 * i) for i in range(N)])
    own = own - own.mean(0)
    own = own * (D**0.5 / own.flatten(1).norm(dim=1).mean())
    return common, common + h * own


def start(rank: int = 4, seed: int = 0, scale: float = 1.0) -> AdapterState:
    """A uniform in +-1/sqrt(K), B = 0."""
    spec = AdapterSpec(
        "lora", rank, scale * rank, (LayerSpec("w", D, K, rank, scale),), (), {}, "base", seed
    )
    a = kaiming_uniform(rank, K, seed, "init", "w", "A")
    return AdapterState(spec, {A: a, B: torch.zeros(D, rank)})


@dataclass(frozen=True)
class Trace:
    """What a run leaves, round by round.

    Attributes:
        products: change of the base and s B A of the global adapter together.
        cross_terms: |T - product| / |T| with T the mean of what the clients ended with.
    """

    products: list[Tensor]
    cross_terms: list[float]


def train(
    tensors: Mapping[str, Tensor],
    factors: Sequence[str],
    goals: Tensor,
    *,
    steps: int,
    rate: float,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """(N clients) `steps` steps of gradient descent in the named factors, all at once."""
    b = tensors[B].double().expand(len(goals), -1, -1).clone()
    a = tensors[A].double().expand(len(goals), -1, -1).clone()
    for _ in range(steps):
        gap = scale * (scale * b @ a - goals)
        grad_b, grad_a = gap @ a.mT, b.mT @ gap
        if "B" in factors:
            b = b - rate * grad_b
        if "A" in factors:
            a = a - rate * grad_a
    return a, b


def base_of(given: Start) -> Tensor:
    """The base that a client stands on: the sum of all folds (D, K)."""
    base = torch.zeros(D, K, dtype=torch.float64)
    for fold in given.fold.values():
        base = base + fold["w.L"].double() @ fold["w.Q"].double()
    return base


def run(
    strategy: str,
    goals: Tensor,
    *,
    rounds: int = 40,
    steps: int = 20,
    rate: float = 0.05,
    scale: float = 1.0,
    seed: int = 0,
    rank: int = 4,
    exact: bool = False,
    options: Mapping[str, Any] | None = None,
) -> Trace:
    """A whole federation.

    Args:
        exact: keep the means of the factors in float64 between rounds, for strategies whose
            next state is nothing else.
    """
    chosen = STRATEGIES[strategy](METHODS["lora"], options)
    state = chosen.init(start(rank, seed, scale))
    if exact:
        state = replace(state, tensors={k: v.double() for k, v in state.tensors.items()})
    trace = Trace([], [])
    anyone = ClientInfo("any", rank)
    for number in range(1, rounds + 1):
        broadcast = chosen.broadcast(state, anyone)
        given, base = broadcast.adapter, base_of(broadcast)
        factors = chosen.factors(state)
        a, b = train(given.tensors, factors, goals - base, steps=steps, rate=rate, scale=scale)
        ended = {A: a, B: b}
        sent = [f"w.{factor}" for factor in factors]
        updates = [
            ClientUpdate(
                run="q",
                round=number,
                attempt=0,
                client=f"{i:02d}",
                start_sha256="",
                delta=AdapterState(
                    given.spec, {k: ended[k][i] - given.tensors[k].double() for k in sent}
                ),
                num_examples=1.0,
                start=given,
                weight=1.0,
            )
            for i in range(len(goals))
        ]
        stats = chosen.reduce(state, updates)
        new = chosen.refactor(state, stats)
        if exact:
            new = replace(new, tensors={**state.tensors, **stats.mean()})
        state = new
        product = scale * state.tensors[B].double() @ state.tensors[A].double()
        product = product + base_of(chosen.broadcast(state, anyone))
        ideal = base + (scale * b @ a).mean(0)
        trace.products.append(product)
        trace.cross_terms.append(float((ideal - product).norm() / ideal.norm()))
    return trace


def relative_error(trace: Trace, common: Tensor) -> float:
    return float((trace.products[-1] - common).norm() / common.norm())


def floor(common: Tensor, a0: Tensor) -> float:
    """|W (I - Pi_A)| / |W|, Pi_A = A^T (A A^T)^-1 A: what rows of a frozen A cannot reach."""
    a0 = a0.double()
    projection = a0.T @ torch.linalg.solve(a0 @ a0.T, a0)
    return float((common - common @ projection).norm() / common.norm())


Errors = dict[tuple[float, ...], dict[str, list[float]]]


def measure(
    strategies: Sequence[str], seeds: int, settings: Sequence[tuple[int, int, float, int]]
) -> tuple[Errors, dict[tuple[float, ...], float]]:
    """Setting -> strategy -> error per seed; setting -> FedIT's mean cross-term, rounds 1-10."""
    errors: Errors = {}
    cross_terms = {}
    for setting in settings:
        answer_rank, rank, h, steps = setting
        found: dict[str, list[float]] = {name: [] for name in strategies}
        crosses = []
        for seed in range(seeds):
            common, goals = targets(h, seed, answer_rank)
            for name in strategies:
                trace = run(name, goals, steps=steps, seed=seed, rank=rank)
                found[name].append(relative_error(trace, common))
                if name == "fedit":
                    crosses.append(statistics.mean(trace.cross_terms[:10]))
        errors[setting] = found
        if crosses:
            cross_terms[setting] = statistics.mean(crosses)
    return errors, cross_terms


def table(errors: Errors, cross_terms: Mapping[tuple[float, ...], float]) -> list[str]:
    """The Markdown table: mean +- standard error over seeds, one row per setting."""
    names = list(next(iter(errors.values())))
    head = ["r*, r, h, tau", *names, *(["cross-term of fedit"] if cross_terms else [])]
    lines = [f"| {' | '.join(head)} |", f"| --- |{' ---: |' * (len(head) - 1)}"]
    for setting, found in errors.items():
        cells = [", ".join(f"{value:g}" for value in setting)]
        for values in found.values():
            error = statistics.stdev(values) / math.sqrt(len(values))
            cells.append(f"{statistics.mean(values):.3f} ± {error:.3f}")
        if cross_terms:
            cells.append(f"{cross_terms[setting]:.3f}")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def orders(errors: Errors) -> list[str]:
    """In how many seeds each strategy is nearer to the answer than FedIT."""
    names = [name for name in next(iter(errors.values())) if name != "fedit"]
    lines = [f"| r*, r, h, tau | {' | '.join(names)} |", f"| --- |{' ---: |' * len(names)}"]
    for setting, found in errors.items():
        # what agrees to 1e-6 is told apart by rounding alone
        wins = [
            sum(x < y - 1e-6 for x, y in zip(found[name], found["fedit"], strict=True))
            for name in names
        ]
        cells = [", ".join(f"{value:g}" for value in setting), *map(str, wins)]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def report(
    options: argparse.Namespace,
    command: str,
    settings: Sequence[tuple[int, int, float, int]] = SETTINGS,
) -> str:
    """The whole page."""
    began = time.perf_counter()
    errors, cross_terms = measure(options.strategies, options.seeds, settings)
    host = machine(torch.get_num_threads())
    lines = [
        "# Federated quadratic",
        "",
        f"    {command}",
        "",
        f"{host['processor']}, {host['system']}; Python {host['python']}, torch "
        f"{host['torch']}, {host['threads']} torch thread(s); "
        f"{time.perf_counter() - began:.0f} s.",
        "",
        f"Ten clients fit a ({D}, {K}) matrix of rank r* with an adapter of rank r; h is how "
        "far their own answers lie from the common one, tau the local steps. 40 rounds, rate "
        "0.05, s = 1, default options. Relative error of the global model, mean ± standard "
        f"error over {options.seeds} seeds; the last column is the mean relative aggregation "
        "error of FedIT in rounds 1 to 10.",
        "",
        *table(errors, cross_terms),
    ]
    if "fedit" in options.strategies:
        lines += [
            "",
            f"Seeds of {options.seeds} in which the error is smaller than FedIT's:",
            "",
            *orders(errors),
        ]
    return "\n".join(lines) + "\n"


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=5, help="2 or more")
    parser.add_argument(
        "--strategies",
        type=lambda text: text.split(","),
        default=[name for name in COMPARED if name in STRATEGIES],
        help="names, with commas between them",
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    return parser.parse_args(given)


def main() -> None:
    options = arguments()
    torch.set_num_threads(1)
    page = report(options, " ".join(["python benchmarks/quadratic.py", *sys.argv[1:]]))
    print(page)
    (options.out / "quadratic.md").write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
