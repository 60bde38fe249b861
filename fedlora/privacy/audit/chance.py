"""Oracles of what is drawn at random: noise and batches.

Their limits are exceeded by correct training with a probability below `FALSE_ALARM`.
"""

import math
from collections.abc import Sequence

import numpy as np
from scipy import stats
from torch import Tensor

from fedlora.privacy.audit.finding import (
    CLIP,
    EXPECTED,
    FALSE_ALARM,
    SIGMA,
    Finding,
    Worst,
    flat,
)
from fedlora.privacy.audit.subject import Subject

_STEPS = 3
_DRAWS, _RECORDS, _QUOTA = 2000, 200, 0.1


def noise_scale(subject: Subject) -> Finding:
    """Noise has mean 0 and variance (sigma C / b)^2, in every tensor, whatever the batch."""
    worst = Worst("noise scale")
    wanted = SIGMA * CLIP / EXPECTED
    batch = range(min(5, len(subject.examples)))

    def tried(batches: Sequence[Sequence[int]], noise: float) -> list[dict[str, Tensor]]:
        return subject.released(batches, clip=CLIP, noise=noise, expected=EXPECTED)

    plain, noisy = tried([batch], 0.0)[0], tried([batch], SIGMA)[0]
    empty = tried([[]] * _STEPS, SIGMA)
    noises = [*empty, {name: noisy[name] - plain[name] for name in plain}]
    level = FALSE_ALARM / (2 * len(noises) * (len(plain) + 1))
    limit = float(stats.norm.isf(level / 2))
    for step, found in enumerate(noises):
        where = "a full batch" if step == len(empty) else f"empty batch {step}"
        for name, values in [*found.items(), ("all parameters", flat(found))]:
            count = values.numel()
            normal = values.flatten() / wanted
            squares = stats.chi2(count)
            total = float(normal.square().sum())
            tail = min(squares.cdf(total), squares.sf(total))
            place = f"the noise on {name}, {where}, in standard scores"
            worst.see(float(stats.norm.isf(tail)), limit, f"variance of {place}")
            mean = abs(float(normal.sum())) / math.sqrt(count)
            worst.see(mean, limit, f"mean of {place}")
    return worst.finding()


def noise_independence(subject: Subject) -> Finding:
    """Noise correlates with nothing: other steps, other rounds, other clients, its neighbours."""
    rows = {
        f"step {step} of {client}, round {number}": flat(found)
        for client, number in (("client-0", 1), ("client-1", 1), ("client-0", 2))
        for step, found in enumerate(
            subject.released(
                [[]] * _STEPS,
                clip=CLIP,
                noise=SIGMA,
                expected=EXPECTED,
                client=client,
                number=number,
            )
        )
    }
    pairs = [
        (one, other, rows[one], rows[other])
        for i, one in enumerate(rows)
        for other in list(rows)[i + 1 :]
    ]
    pairs += [(name, "its neighbours", row[:-1], row[1:]) for name, row in rows.items()]
    worst = Worst("noise independence")
    count = len(next(iter(rows.values()))) - 1
    limit = float(stats.norm.isf(FALSE_ALARM / (2 * len(pairs)))) / math.sqrt(count)
    for one, other, x, y in pairs:
        size = float(x.norm() * y.norm())
        # without any noise everything is as equal as can be
        correlation = abs(float(x @ y)) / size if size else 1.0
        worst.see(correlation, limit, f"correlation of {one} and {other}")
    return worst.finding()


def sampling(subject: Subject) -> Finding:
    """Batches are Poisson: sizes vary by n q (1 - q), and every example is in q of them."""
    worst = Worst("sampling")
    mechanism = subject.mechanism(
        examples=_RECORDS,
        rate=_QUOTA,
        clip=CLIP,
        noise_multiplier=SIGMA,
        source=subject.source("client-0", 1),
        uniform=subject.uniform,
    )
    taken = np.zeros((_DRAWS, _RECORDS), dtype=bool)
    for row in taken:
        row[mechanism.batch()] = True
    level = FALSE_ALARM / (2 * _RECORDS + 3)
    score = stats.norm.isf(level / 2)
    spread = float(taken.sum(1).var()) / (_RECORDS * _QUOTA * (1 - _QUOTA))
    # the variance of a sample variance of binomials is close to that of normals
    limit = 1.2 * float(score) * math.sqrt(2 / _DRAWS)
    worst.see(abs(spread - 1.0), limit, f"batch size varies {spread:.2f} times n q (1 - q)")
    count = stats.binom(_DRAWS, _QUOTA)
    for record, times in enumerate(taken.sum(0).tolist()):
        tail = min(count.cdf(times), count.sf(times - 1))
        place = f"inclusion of example {record}, in standard scores"
        worst.see(float(stats.norm.isf(tail)), float(score), place)
    # that two draws are equal is all but impossible
    again = np.zeros(_RECORDS, dtype=bool)
    again[mechanism.batch()] = True
    repeated = float((taken == again).all(1).sum())
    worst.see(repeated, 0.5, "batches that were drawn before")
    return worst.finding()
