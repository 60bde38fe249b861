"""What a mechanism that protects clients must do; each oracle raises AssertionError.

An oracle is given `make`: (noise multiplier, expected clients, mode or source, adaptive) ->
mechanism, so that broken ones go through the same questions. Statistical bounds are set so that
the correct mechanism fails less than once in a million runs.
"""

import math

import torch

from fedlora.privacy.central import AdaptiveClip
from fedlora.privacy.noise import noise_source

SHAPES = {"a.A": (40, 30), "a.B": (50, 20), "head.weight": (7, 100)}
SEED = 5


class Silence:
    """No noise, so that sums can be read."""

    mode = "test"

    def normal(self, shape, device="cpu"):
        return torch.zeros(tuple(shape), dtype=torch.float64)


def silent(number):
    return Silence()


def from_os(number):
    return noise_source("os", SEED, "central", number)


def update(seed, norm, shapes=SHAPES):
    """A client's update of a given norm."""
    stream = torch.Generator().manual_seed(seed)
    drawn = {name: torch.randn(shape, generator=stream) for name, shape in shapes.items()}
    scale = norm / math.sqrt(sum(float((t.double() ** 2).sum()) for t in drawn.values()))
    return {name: scale * tensor for name, tensor in drawn.items()}


def flat(tensors):
    return torch.cat([tensors[name].flatten().double() for name in sorted(tensors)])


def noise_scale(make):
    z, expected, clip = 1.3, 6.0, 0.25
    std = z * clip / expected
    for updates in ([], [update(1, 1e-9), update(2, 1e-9)]):
        mean = make(z, expected, from_os).round(1, updates, SHAPES, clip).mean
        whole = flat(mean)
        assert abs(float(whole.var()) / std**2 - 1) < 5 * math.sqrt(2 / len(whole))
        assert abs(float(whole.mean())) < 5 * std / math.sqrt(len(whole))
        for tensor in mean.values():
            spread = float(tensor.var()) / std**2
            assert abs(spread - 1) < 6.5 * math.sqrt(2 / tensor.numel())


def noise_independence(make):
    here, there = make(1.0, 4.0, from_os), make(1.0, 4.0, from_os)
    draws = [flat(here.round(number, [], SHAPES, 1.0).mean) for number in (1, 2, 2)]
    draws.append(flat(there.round(1, [], SHAPES, 1.0).mean))
    for i, one in enumerate(draws):
        for other in draws[:i]:
            correlation = float(torch.corrcoef(torch.stack([one, other]))[0, 1])
            assert abs(correlation) < 6 / math.sqrt(len(one))
    # nor between the tensors of one release
    tensors = [t.flatten() for t in here.round(3, [], SHAPES, 1.0).mean.values()]
    for i, one in enumerate(tensors):
        for other in tensors[:i]:
            size = min(len(one), len(other))
            pair = torch.stack([one[:size], other[:size]])
            assert abs(float(torch.corrcoef(pair)[0, 1])) < 6 / math.sqrt(size)


def additivity(make):
    mechanism = make(1.0, 5.0, silent)
    crowd = [update(seed, norm) for seed, norm in enumerate((0.3, 1.0, 4.0))]
    extra = update(9, 2.0)
    without = flat(mechanism.round(1, crowd, SHAPES, 10.0).mean)
    together = flat(mechanism.round(1, [*crowd, extra], SHAPES, 10.0).mean)
    alone = flat(mechanism.round(1, [extra], SHAPES, 10.0).mean)
    assert float((together - without - alone).norm()) < 1e-9
    assert float(alone.norm()) > 0.1


def sensitivity(make):
    expected = 5.0
    mechanism = make(1.0, expected, silent)
    crowd = [update(seed, norm) for seed, norm in enumerate((0.3, 1.0, 4.0))]
    for clip in (0.1, 0.5, 2.0):
        without = flat(mechanism.round(1, crowd, SHAPES, clip).mean)
        for norm in (0.0, 0.05, 1.0, 100.0, 1e6):
            together = mechanism.round(1, [*crowd, update(9, norm)], SHAPES, clip).mean
            moved = expected * float((flat(together) - without).norm())
            assert moved <= clip * (1 + 1e-9)
            # what is within the bound is taken whole
            assert moved >= min(norm, clip) * (1 - 1e-6)


def denominator(make):
    mechanism = make(1.0, 8.0, silent)
    crowd = [update(seed, 0.5) for seed in range(20)]
    for replies in (0, 1, 3, 8, 20):
        total = sum((flat(u) for u in crowd[:replies]), torch.zeros(2900, dtype=torch.float64))
        found = flat(mechanism.round(1, crowd[:replies], SHAPES, 1.0).mean)
        torch.testing.assert_close(found, total / 8, rtol=1e-9, atol=1e-12)
    # nor by how much was clipped
    long = [update(seed, 4.0) for seed in range(3)]
    total = sum(flat(u) for u in long) / 4
    torch.testing.assert_close(flat(mechanism.round(1, long, SHAPES, 1.0).mean), total / 8)


def odd_updates(make):
    mechanism = make(1.0, 4.0, silent)
    crowd = [update(1, 0.5), update(2, 3.0)]
    clean = flat(mechanism.round(1, crowd, SHAPES, 1.0).mean)
    zero = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    assert torch.equal(flat(mechanism.round(1, [*crowd, zero], SHAPES, 1.0).mean), clean)
    for value in (math.nan, math.inf, -math.inf):
        odd = update(3, 1.0)
        odd["a.B"][0, 0] = value
        found = flat(mechanism.round(1, [crowd[0], odd, crowd[1]], SHAPES, 1.0).mean)
        assert torch.equal(found, clean)


def adaptive_follows(make):
    norms = [0.2 * 1.4**i for i in range(9)]
    crowd = [update(i, norm, {"x": (3,)}) for i, norm in enumerate(norms)]
    median = norms[4]
    mechanism = make(1.0, float(len(crowd)), silent, AdaptiveClip())
    for start in (0.01 * median, 100 * median):
        clip = start
        for number in range(60):
            release = mechanism.round(number, crowd, {"x": (3,)}, clip)
            clip = mechanism.adaptive.next_clip(clip, release.within)
        assert median / 1.3 < clip < 1.3 * median


def adaptive_cost(make):
    """Sum and count together move by no more than one sum with multiplier z would."""
    shapes, clip = {"x": (3,)}, 0.7
    for z, expected in ((1.0, 100.0), (2.0, 10.0)):
        adaptive = make(z, expected, silent, AdaptiveClip())
        spread = flat_std(make, z, expected, clip)
        base = adaptive.round(1, [update(1, 0.2, shapes)], shapes, clip)
        for norm in (0.1, 0.69, 5.0):
            more = [update(1, 0.2, shapes), update(2, norm, shapes)]
            found = adaptive.round(1, more, shapes, clip)
            moved = float((flat(found.mean) - flat(base.mean)).norm()) / spread[0]
            counted = (found.within - base.within) / spread[1]
            # the two standard deviations were measured, to 1.2 %
            assert math.hypot(moved, counted) <= 1.06 / z


def flat_std(make, z, expected, clip):
    """Standard deviations of mean and count, measured."""
    mechanism = make(z, expected, from_os, AdaptiveClip())
    draws = [mechanism.round(number, [], {"x": (8,)}, clip) for number in range(4000)]
    within = torch.tensor([draw.within for draw in draws], dtype=torch.float64)
    means = torch.stack([draw.mean["x"] for draw in draws])
    return float(means.std()), float(within.std())


ORACLES = (
    noise_scale,
    noise_independence,
    additivity,
    sensitivity,
    denominator,
    odd_updates,
    adaptive_follows,
    adaptive_cost,
)
