"""The one-run audit: a lower bound on epsilon by guessing who took part, from outside alone.

Steinke, Nasr and Jagielski 2023, "Privacy Auditing with One (1) Training Run",
https://arxiv.org/abs/2305.08846. m canaries each take part with probability 1/2; the auditor
sees what was released and guesses. If the mechanism is (epsilon, delta) private, not many
guesses can be right (theorem 5.2); if more are, the claim is false.

The canaries are the easiest there are: each one's gradient has an entry of its own and is
long (Dirac canaries). Still the bound is far below the truth, so that it is an alarm for gross
faults at a small claimed epsilon, and no proof: it does not see noise that is used again.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from scipy import optimize, stats
from torch import Tensor, nn

from fedlora.privacy.accounting import Event, epsilon
from fedlora.privacy.mechanism import Mechanism
from fedlora.privacy.noise import OsNoise
from fedlora.privacy.pieces import Whole
from fedlora.privacy.sampling import secret_uniform
from fedlora.seeds import generator

CANARIES, FILLERS, STEPS, RATE, SIGMA, CLIP = 800, 100, 40, 0.2, 6.0, 1.0
DELTA = 1e-5
CONFIDENCE = 0.95
# parts of the canaries that are guessed; the others are abstained from
LEVELS = (0.05, 0.1, 0.25, 0.5, 1.0)
_LENGTH = 10.0
MakeMechanism = Callable[..., Mechanism]


@dataclass(frozen=True)
class Audit:
    """What one audited run showed.

    Attributes:
        claimed: epsilon by the accountant, at `DELTA`.
        bound: epsilon is at least so large, with probability `CONFIDENCE`.
        guesses: how many were made at the level that gives the bound.
        right: how many of them were right.
    """

    claimed: float
    bound: float
    guesses: int
    right: int

    @property
    def falsified(self) -> bool:
        """Whether the claim is refuted."""
        return self.bound > self.claimed


def audit(seed: int, make: MakeMechanism = Mechanism) -> Audit:
    """Trains once with canaries and tries to tell which took part.

    Args:
        seed: of the choice of canaries; noise and batches are from the operating system.
        make: the mechanism, called as `Mechanism`.
    """
    flips = torch.randint(0, 2, (CANARIES,), generator=generator(seed, "canaries")).bool()
    scores = _scores(flips, make)
    claimed = epsilon([Event(RATE, SIGMA, STEPS)], DELTA, "prv")
    order = scores.argsort()
    found = []
    for level in LEVELS:
        half = round(level * CANARIES / 2)
        out, taken = order[:half], order[-half:]
        right = int(flips[taken].sum() + (~flips[out]).sum())
        # one of several levels is chosen after the fact
        beta = (1 - CONFIDENCE) / len(LEVELS)
        found.append((lower_bound(CANARIES, 2 * half, right, beta), 2 * half, right))
    bound, guesses, right = max(found)
    return Audit(claimed, bound, guesses, right)


def lower_bound(
    canaries: int, guesses: int, right: int, beta: float, delta: float = DELTA
) -> float:
    """Largest epsilon that so many right guesses refute; 0 if none.

    Args:
        canaries: m.
        guesses: r, that were not abstained from.
        right: v, of them.
        beta: probability of refuting a true claim.
    """

    def excess(epsilon: float) -> float:
        return refuting(canaries, guesses, right, epsilon, delta) - beta

    if excess(0.0) > 0.0:
        return 0.0
    return float(optimize.brentq(excess, 0.0, 50.0)) if excess(50.0) > 0.0 else 50.0


def refuting(canaries: int, guesses: int, right: int, epsilon: float, delta: float) -> float:
    """Most that P[W >= v] can be under (epsilon, delta) privacy; theorem 5.2 of the paper.

    f(v) + 2 m delta max_i (f(v - i) - f(v)) / i, f the tail of Binomial(r, e^eps / (1 + e^eps)).
    """
    tail = stats.binom(guesses, 1.0 / (1.0 + math.exp(-epsilon))).sf
    least = float(tail(right - 1))
    if right == 0:
        return 1.0
    steps = np.arange(1, right + 1)
    steepest = float(((tail(right - steps - 1) - least) / steps).max())
    return min(1.0, least + 2 * canaries * delta * steepest)


def _scores(flips: Tensor, make: MakeMechanism) -> Tensor:
    """How much each canary seems to have taken part, (m,), from what is released alone."""
    members = flips.nonzero().flatten()
    count = len(members) + FILLERS
    parameters = {"weight": nn.Parameter(torch.zeros(CANARIES + FILLERS))}
    mechanism = make(
        examples=count,
        rate=RATE,
        clip=CLIP,
        noise_multiplier=SIGMA,
        source=OsNoise(),
        uniform=secret_uniform,
    )
    # the entry of each example's gradient
    places = torch.cat([members, torch.arange(CANARIES, CANARIES + FILLERS)])
    scores = torch.zeros(CANARIES + FILLERS, dtype=torch.float64)
    for _ in range(STEPS):
        batch = mechanism.batch()
        grads = torch.zeros(len(batch), CANARIES + FILLERS)
        grads[torch.arange(len(batch)), places[batch]] = _LENGTH
        sums = mechanism.clipped({"weight": Whole(grads)}) if batch else {}
        scores += mechanism.released(sums, parameters)["weight"].double()
    return scores[:CANARIES]
