"""Oracles of the clipped sum: what each example adds to it, and what it is divided by."""

from collections.abc import Sequence

import torch

from fedlora.privacy.audit.finding import EXPECTED, Finding, Worst, norm
from fedlora.privacy.audit.subject import Subject


def additivity(subject: Subject) -> Finding:
    """S(D + {x}) = S(D) + S({x}), x shorter or longer than all of D, clipped or not."""
    worst = Worst("additivity")
    far = 2.0 * max(norm(subject.gradient(i)) for i in range(len(subject.examples)))
    for clip in (far, far / 20.0):
        tolerance = (1e-4 if subject.exact else 0.05) * clip
        for extra in _extremes(subject):
            rest = [i for i in range(len(subject.examples)) if i != extra]
            together = subject.sums(range(len(subject.examples)), clip)
            apart, alone = subject.sums(rest, clip), subject.sums([extra], clip)
            gap = norm({n: together[n] - apart[n] - alone[n] for n in together})
            worst.see(gap, tolerance, f"S(D + x) - S(D) - S(x) at C = {clip:.3g}, x = {extra}")
    return worst.finding()


def sensitivity(subject: Subject) -> Finding:
    """One example more changes the clipped sum by at most C."""
    worst = Worst("sensitivity")
    slack = 1e-4 if subject.exact else 0.05
    for clip in (0.1, 0.5, 2.0):
        together = subject.sums(range(len(subject.examples)), clip)
        for extra in _extremes(subject):
            rest = [i for i in range(len(subject.examples)) if i != extra]
            apart = subject.sums(rest, clip)
            change = norm({name: together[name] - apart[name] for name in together})
            worst.see(change / clip, 1.0 + slack, f"|S(D + x) - S(D)| / C at C = {clip:g}")
    return worst.finding()


def denominator(subject: Subject) -> Finding:
    """Without noise a step releases S / b, S by plain autograd, b not the size of the batch."""
    worst = Worst("denominator")
    gradients = [subject.gradient(i) for i in range(len(subject.examples))]
    lengths = sorted(map(norm, gradients))
    # half of the examples are clipped
    clip = lengths[len(lengths) // 2]
    for size in (1, len(gradients) - 1):
        total = {name: torch.zeros_like(g) for name, g in gradients[0].items()}
        for g in gradients[:size]:
            factor = min(1.0, clip / max(norm(g), 1e-30))
            for name in total:
                total[name] += factor * g[name]
        found = subject.released([range(size)], clip=clip, noise=0.0, expected=EXPECTED)[0]
        gap = norm({name: found[name] - total[name] / EXPECTED for name in total})
        tolerance = 1e-5 if subject.exact else 0.05
        place = f"|update - S / b| / |S / b|, {size} examples, b = {EXPECTED:g}"
        worst.see(gap / (norm(total) / EXPECTED), tolerance, place)
    return worst.finding()


def non_finite(subject: Subject) -> Finding:
    """An example whose gradient is not finite counts zero; the others count as ever."""
    worst = Worst("non-finite example")
    everybody = range(len(subject.examples))
    clip = 0.5
    with subject.spoilt():
        found = subject.sums(everybody, clip)
    others = subject.sums(everybody[1:], clip)
    gap = norm({name: found[name] - others[name] for name in found})
    tolerance = (1e-4 if subject.exact else 0.05) * clip
    worst.see(gap, tolerance, "S(D with x not finite) - S(D without x)")
    return worst.finding()


def _extremes(subject: Subject) -> Sequence[int]:
    """The shortest and the longest example."""
    sizes = [sum(t.numel() for t in e.inputs.values()) for e in subject.examples]
    return sorted({sizes.index(min(sizes)), sizes.index(max(sizes))})
