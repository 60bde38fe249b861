"""Federated quadratic: clients fit sB A to their own matrix by plain gradient descent.

Client i minimises 1/2 |s B A - M_i|^2 with M_i = W + h D_i, sum_i D_i = 0, all float64. Only
the client is written here; broadcast, mean and next state are those of the strategy.
"""

from dataclasses import dataclass, replace

import torch

from fedlora.adapter import AdapterSpec, AdapterState, LayerSpec
from fedlora.adapters import METHODS
from fedlora.adapters.lora import kaiming_uniform
from fedlora.messages import ClientUpdate
from fedlora.strategies import STRATEGIES
from fedlora.strategies.base import ClientInfo

D, K, N = 32, 24, 10
A, B = "w.A", "w.B"


def gauss(*shape, seed):
    draws = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=draws, dtype=torch.float64)


def low_rank(rank, seed):
    """A random (D, K) matrix of this rank with Frobenius norm sqrt(D)."""
    matrix = gauss(D, rank, seed=seed) @ gauss(rank, K, seed=seed + 1)
    return matrix * (D**0.5 / matrix.norm())


def targets(h, seed, rank=4):
    """(W, M (N, D, K)): what the federation and what each client wants."""
    common = low_rank(rank, 10_000 + seed)
    own = torch.stack([low_rank(rank, 20_000 + 100 * seed + 2 * i) for i in range(N)])
    own = own - own.mean(0)
    own = own * (D**0.5 / own.flatten(1).norm(dim=1).mean())
    return common, common + h * own


def start(rank=4, seed=0, scale=1.0):
    spec = AdapterSpec(
        "lora", rank, scale * rank, (LayerSpec("w", D, K, rank, scale),), (), {}, "base", seed
    )
    a = kaiming_uniform(rank, K, seed, "init", "w", "A")
    return AdapterState(spec, {A: a, B: torch.zeros(D, rank)})


@dataclass(frozen=True)
class Trace:
    """What a run leaves, round by round."""

    products: list[torch.Tensor]  # s B A of the global adapter
    cross_terms: list[float]  # |T - s B A| / |T|


def train(tensors, factors, goals, *, steps, rate, scale=1.0):
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


def run(strategy, goals, *, rounds=40, steps=20, rate=0.05, scale=1.0, seed=0, rank=4, exact=False):
    """A whole federation; `exact` keeps the state in float64 between rounds."""
    chosen = STRATEGIES[strategy](METHODS["lora"])
    state = chosen.init(start(rank, seed, scale))
    if exact:
        state = replace(state, tensors={k: v.double() for k, v in state.tensors.items()})
    trace = Trace([], [])
    for number in range(1, rounds + 1):
        given = chosen.broadcast(state, ClientInfo("any", rank)).adapter
        factors = chosen.factors(state)
        a, b = train(given.tensors, factors, goals, steps=steps, rate=rate, scale=scale)
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
        ideal = (scale * b @ a).mean(0)
        trace.products.append(product)
        trace.cross_terms.append(float((ideal - product).norm() / ideal.norm()))
    return trace


def relative_error(trace, common):
    return float((trace.products[-1] - common).norm() / common.norm())


def floor(common, a0):
    """|W (I - Pi_A)| / |W|, Pi_A = A^T (A A^T)^-1 A: what rows of a frozen A cannot reach."""
    a0 = a0.double()
    projection = a0.T @ torch.linalg.solve(a0 @ a0.T, a0)
    return float((common - common @ projection).norm() / common.norm())
