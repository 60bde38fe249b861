"""Oracles: what must be true of private training, tried on the training itself.

Each holds by construction of DP-SGD (Abadi et al., https://arxiv.org/abs/1607.00133,
algorithm 1) and compares what steps release with an independent figure. Statistical ones have
limits that correct training exceeds with a probability below `FALSE_ALARM`.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from fedlora.errors import TrainingError
from fedlora.privacy.audit.subject import Subject

FALSE_ALARM = 1e-8
"""Probability that one statistical oracle fails correct training; Bonferroni within it."""
# noise multiplier, clip norm and expected batch, of which no two coincide, nor their products
_SIGMA, _CLIP, _EXPECTED = 1.5, 0.4, 3.0
_STEPS = 3
_DRAWS, _RECORDS, _QUOTA = 2000, 200, 0.1


@dataclass(frozen=True)
class Finding:
    """What an oracle found.

    Attributes:
        oracle: its name.
        passed: whether the figure is within the tolerance.
        figure: largest deviation that was seen.
        tolerance: largest deviation that is allowed.
        detail: of what, and where.
    """

    oracle: str
    passed: bool
    figure: float
    tolerance: float
    detail: str


Oracle = Callable[[Subject], Finding]


def noise_scale(subject: Subject) -> Finding:
    """Noise has mean 0 and variance (sigma C / b)^2, in every tensor, whatever the batch."""
    worst = _Worst("noise scale")
    wanted = _SIGMA * _CLIP / _EXPECTED
    terms = {"clip": _CLIP, "expected": _EXPECTED}
    batch = range(min(5, len(subject.examples)))
    plain = subject.released([batch], noise=0.0, **terms)[0]
    noisy = subject.released([batch], noise=_SIGMA, **terms)[0]
    empty = subject.released([[]] * _STEPS, noise=_SIGMA, **terms)
    noises = [*empty, {name: noisy[name] - plain[name] for name in plain}]
    level = FALSE_ALARM / (2 * len(noises) * (len(plain) + 1))
    limit = float(stats.norm.isf(level / 2))
    for step, found in enumerate(noises):
        where = "a full batch" if step == len(empty) else f"empty batch {step}"
        for name, values in [*found.items(), ("all parameters", _flat(found))]:
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
    terms = {"clip": _CLIP, "noise": _SIGMA, "expected": _EXPECTED}
    rows = {
        f"step {step} of {client}, round {number}": _flat(found)
        for client, number in (("client-0", 1), ("client-1", 1), ("client-0", 2))
        for step, found in enumerate(
            subject.released([[]] * _STEPS, client=client, number=number, **terms)
        )
    }
    pairs = [
        (one, other, rows[one], rows[other])
        for i, one in enumerate(rows)
        for other in list(rows)[i + 1 :]
    ]
    pairs += [(name, "its neighbours", row[:-1], row[1:]) for name, row in rows.items()]
    worst = _Worst("noise independence")
    count = len(next(iter(rows.values()))) - 1
    limit = float(stats.norm.isf(FALSE_ALARM / (2 * len(pairs)))) / math.sqrt(count)
    for one, other, x, y in pairs:
        size = float(x.norm() * y.norm())
        # without any noise everything is as equal as can be
        correlation = abs(float(x @ y)) / size if size else 1.0
        worst.see(correlation, limit, f"correlation of {one} and {other}")
    return worst.finding()


def additivity(subject: Subject) -> Finding:
    """S(D + {x}) = S(D) + S({x}), x shorter or longer than all of D, clipped or not."""
    worst = _Worst("additivity")
    far = 2.0 * max(_norm(subject.gradient(i)) for i in range(len(subject.examples)))
    for clip in (far, far / 20.0):
        tolerance = (1e-4 if subject.exact else 0.05) * clip
        for extra in _extremes(subject):
            rest = [i for i in range(len(subject.examples)) if i != extra]
            together = subject.sums(range(len(subject.examples)), clip)
            apart, alone = subject.sums(rest, clip), subject.sums([extra], clip)
            gap = _norm({n: together[n] - apart[n] - alone[n] for n in together})
            worst.see(gap, tolerance, f"S(D + x) - S(D) - S(x) at C = {clip:.3g}, x = {extra}")
    return worst.finding()


def sensitivity(subject: Subject) -> Finding:
    """One example more changes the clipped sum by at most C."""
    worst = _Worst("sensitivity")
    slack = 1e-4 if subject.exact else 0.05
    for clip in (0.1, 0.5, 2.0):
        together = subject.sums(range(len(subject.examples)), clip)
        for extra in _extremes(subject):
            rest = [i for i in range(len(subject.examples)) if i != extra]
            apart = subject.sums(rest, clip)
            change = _norm({name: together[name] - apart[name] for name in together})
            worst.see(change / clip, 1.0 + slack, f"|S(D + x) - S(D)| / C at C = {clip:g}")
    return worst.finding()


def denominator(subject: Subject) -> Finding:
    """Without noise a step releases S / b, S by plain autograd, b not the size of the batch."""
    worst = _Worst("denominator")
    gradients = [subject.gradient(i) for i in range(len(subject.examples))]
    lengths = sorted(map(_norm, gradients))
    # half of the examples are clipped
    clip = lengths[len(lengths) // 2]
    for size in (1, len(gradients) - 1):
        total = {name: torch.zeros_like(g) for name, g in gradients[0].items()}
        for g in gradients[:size]:
            factor = min(1.0, clip / max(_norm(g), 1e-30))
            for name in total:
                total[name] += factor * g[name]
        found = subject.released([range(size)], clip=clip, noise=0.0, expected=_EXPECTED)[0]
        gap = _norm({name: found[name] - total[name] / _EXPECTED for name in total})
        tolerance = 1e-5 if subject.exact else 0.05
        place = f"|update - S / b| / |S / b|, {size} examples, b = {_EXPECTED:g}"
        worst.see(gap / (_norm(total) / _EXPECTED), tolerance, place)
    return worst.finding()


def non_finite(subject: Subject) -> Finding:
    """An example whose gradient is not finite counts zero; the others count as ever."""
    worst = _Worst("non-finite example")
    everybody = range(len(subject.examples))
    clip = 0.5
    with subject.spoilt():
        found = subject.sums(everybody, clip)
    others = subject.sums(everybody[1:], clip)
    gap = _norm({name: found[name] - others[name] for name in found})
    tolerance = (1e-4 if subject.exact else 0.05) * clip
    worst.see(gap, tolerance, "S(D with x not finite) - S(D without x)")
    return worst.finding()


def sampling(subject: Subject) -> Finding:
    """Batches are Poisson: sizes vary by n q (1 - q), and every example is in q of them."""
    worst = _Worst("sampling")
    mechanism = subject.mechanism(
        examples=_RECORDS,
        rate=_QUOTA,
        clip=_CLIP,
        noise_multiplier=_SIGMA,
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
    worst.see(abs(spread - 1.0) / limit, 1.0, f"batch size varies {spread:.2f} times n q (1 - q)")
    limit = float(score) * math.sqrt(_QUOTA * (1 - _QUOTA) / _DRAWS) * 1.2
    for record, share in enumerate(taken.mean(0)):
        worst.see(abs(share - _QUOTA) / limit, 1.0, f"inclusion of example {record}")
    # that two draws are equal is all but impossible
    again = np.zeros(_RECORDS, dtype=bool)
    again[mechanism.batch()] = True
    repeated = float((taken == again).all(1).sum())
    worst.see(repeated, 0.5, "batches that were drawn before")
    return worst.finding()


ORACLES: Mapping[str, Oracle] = {
    "noise scale": noise_scale,
    "noise independence": noise_independence,
    "additivity": additivity,
    "sensitivity": sensitivity,
    "denominator": denominator,
    "non-finite example": non_finite,
    "sampling": sampling,
}


def consult(subject: Subject, oracles: Mapping[str, Oracle] = ORACLES) -> Iterable[Finding]:
    """What each oracle finds, one after another; training that refuses to run has failed it."""
    with subject.prepared():
        for name, oracle in oracles.items():
            try:
                yield oracle(subject)
            except TrainingError as e:
                yield Finding(name, False, math.inf, 0.0, str(e))


class _Worst:
    """The largest of many deviations, each over its tolerance."""

    def __init__(self, oracle: str) -> None:
        self.oracle = oracle
        self.seen: list[tuple[float, float, str]] = []

    def see(self, figure: float, tolerance: float, detail: str) -> None:
        self.seen.append((figure if math.isfinite(figure) else math.inf, tolerance, detail))

    def finding(self) -> Finding:
        figure, tolerance, detail = max(self.seen, key=lambda one: one[0] / one[1])
        return Finding(self.oracle, figure <= tolerance, figure, tolerance, detail)


def _extremes(subject: Subject) -> Sequence[int]:
    """The shortest and the longest example."""
    sizes = [sum(t.numel() for t in e.inputs.values()) for e in subject.examples]
    return sorted({sizes.index(min(sizes)), sizes.index(max(sizes))})


def _flat(tensors: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)])


def _norm(tensors: Mapping[str, Tensor]) -> float:
    return float(_flat(tensors).norm())
