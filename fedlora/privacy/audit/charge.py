"""The oracle of the ledger: what it says was spent is what was done."""

import math
import tempfile
from pathlib import Path

import numpy as np

from fedlora.privacy.accounting import Event
from fedlora.privacy.audit.finding import CLIP, EXPECTED, Finding, Worst
from fedlora.privacy.audit.subject import DELTA, Subject, Taking
from fedlora.privacy.ledger import Release


def accounting(subject: Subject) -> Finding:
    """The ledger has every step, empty ones and those before a restart too, at its true cost.

    The cost is computed again by the moments of the sampled Gaussian mechanism at whole orders
    (Mironov et al., https://arxiv.org/abs/1908.10530, section 3.3), which is a little more than
    what the ledger may say.
    """
    worst = Worst("accounting")
    count = len(subject.examples)
    rate, sigma = EXPECTED / count, 8.0
    rounds: tuple[list[list[int]], ...] = ([[0, 1, 2], [], []], [[1, 2], []])
    drawn = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for number, batches in enumerate(rounds, 1):
            # each time anew, as after a restart
            with subject.ledger(folder) as ledger:
                release = Release("selftest", number, 1, f"{number:064x}")
                planned = [Event(rate, sigma, len(batches))]
                ledger.reserve(release, planned)
                taking = Taking(batches)
                subject.released(taking, clip=CLIP, noise=sigma, expected=EXPECTED, number=number)
                drawn += taking.drawn
                ledger.spend(release, planned, b"what was released")
        with subject.ledger(folder) as ledger:
            charged, stated = ledger.charged("selftest"), ledger.epsilon("selftest")
    steps = sum(event.steps for event in charged)
    worst.see(abs(steps - drawn), 0.5, f"{steps} steps in the ledger, {drawn} were taken")
    epsilon = _whole_orders(rate, sigma, drawn, DELTA)
    worst.see(abs(stated - epsilon), 0.01 * epsilon, f"epsilon {stated:.4f}, not {epsilon:.4f}")
    return worst.finding()


def _whole_orders(rate: float, sigma: float, steps: int, delta: float) -> float:
    """Epsilon of Poisson-sampled Gaussian steps, by Renyi divergences of orders 2 to 255."""
    best = math.inf
    for order in range(2, 256):
        terms = [
            math.lgamma(order + 1)
            - math.lgamma(k + 1)
            - math.lgamma(order - k + 1)
            + (order - k) * math.log1p(-rate)
            + k * math.log(rate)
            + (k * k - k) / (2 * sigma**2)
            for k in range(order + 1)
        ]
        spent = steps * float(np.logaddexp.reduce(terms)) / (order - 1)
        slack = math.log1p(-1 / order) - (math.log(delta) + math.log(order)) / (order - 1)
        best = min(best, spent + slack)
    return best
