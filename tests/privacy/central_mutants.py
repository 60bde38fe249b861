"""Mechanisms that look right and are not: each has one fault, and names the oracle it fails.

They are faults that published code has, or that a change could bring in.
"""

import math
from dataclasses import replace

import torch

from fedlora.privacy.central import (
    AdaptiveClip,
    CentralGaussian,
    ClippedSum,
    Release,
    clipped_sum,
    flat_norm,
)
from fedlora.privacy.noise import TestNoise

MUTANTS = {}


def fails(oracle):
    """Registers a mutant with the oracle that must catch it."""

    def register(kind):
        MUTANTS[kind.__name__] = (kind, oracle)
        return kind

    return register


def summed(updates, shapes, clip, share):
    """A sum in which update u counts `share(u)` times."""
    sums = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in shapes.items()}
    for update in updates:
        if math.isfinite(flat_norm(update)):
            for name in sums:
                sums[name] += share(update, name) * update[name].double()
    return ClippedSum(sums, 0.0, clip)


def scaled(release, factor):
    return replace(release, mean={name: factor * t for name, t in release.mean.items()})


@fails("sensitivity")
class NoClip(CentralGaussian):
    def round(self, number, updates, shapes, clip):
        return self.release(number, summed(updates, shapes, clip, lambda u, name: 1.0))


@fails("sensitivity")
class ClipPerTensor(CentralGaussian):
    def round(self, number, updates, shapes, clip):
        def share(update, name):
            return min(1.0, clip / max(float(update[name].double().norm()), 1e-300))

        return self.release(number, summed(updates, shapes, clip, share))


@fails("sensitivity")
class ClipByLargestEntry(CentralGaussian):
    def round(self, number, updates, shapes, clip):
        def share(update, name):
            return min(1.0, clip / max(max(float(t.abs().max()) for t in update.values()), 1e-300))

        return self.release(number, summed(updates, shapes, clip, share))


@fails("sensitivity")
class ClipTheMean(CentralGaussian):
    def round(self, number, updates, shapes, clip):
        clipped = summed(updates, shapes, clip, lambda u, name: 1.0)
        norm = flat_norm(clipped.sums) / max(len(list(updates)), 1)
        share = min(1.0, clip / norm) if norm else 1.0
        return self.release(
            number, replace(clipped, sums={k: share * t for k, t in clipped.sums.items()})
        )


@fails("denominator")
class AlwaysToTheBound(CentralGaussian):
    """Short updates are stretched to S."""

    def round(self, number, updates, shapes, clip):
        return self.release(
            number,
            summed(updates, shapes, clip, lambda u, name: clip / max(flat_norm(u), 1e-300)),
        )


@fails("odd_updates")
class NotFinitePasses(CentralGaussian):
    """As min(1, nan), which is 1."""

    def round(self, number, updates, shapes, clip):
        sums = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in shapes.items()}
        for update in updates:
            norm = flat_norm(update)
            share = min(1.0, clip / norm) if norm else 1.0
            for name in sums:
                sums[name] += share * update[name].double()
        return self.release(number, ClippedSum(sums, 0.0, clip))


@fails("odd_updates")
class ZeroDivides(CentralGaussian):
    def round(self, number, updates, shapes, clip):
        return self.release(
            number, summed(updates, shapes, clip, lambda u, name: min(1.0, clip / flat_norm(u)))
        )


@fails("denominator")
class DividesByReplies(CentralGaussian):
    def round(self, number, updates, shapes, clip):
        release = super().round(number, updates, shapes, clip)
        return scaled(release, self.expected / max(len(list(updates)), 1))


@fails("denominator")
class DividesByTheSumOfWeights(CentralGaussian):
    """The weights are what the clip left of the updates."""

    def round(self, number, updates, shapes, clip):
        release = super().round(number, updates, shapes, clip)
        total = sum(min(1.0, clip / flat_norm(u)) for u in updates)
        return scaled(release, self.expected / max(total, 1.0))


@fails("denominator")
class DropOutsRenormalised(CentralGaussian):
    """Too few replies are scaled up to as many as were expected."""

    def round(self, number, updates, shapes, clip):
        release = super().round(number, updates, shapes, clip)
        count = len(list(updates))
        return scaled(release, self.expected / count) if 0 < count < self.expected else release


class Noise(CentralGaussian):
    """Mutants of the noise on the mean; its standard deviation comes from `std`."""

    def std(self, clip):
        return self.sum_multiplier * clip

    def drawn(self, number, name, shape):
        return self.source(number).normal(shape)

    def release(self, number, clipped):
        right = super().release(number, clipped)
        mean = {
            name: (total + self.std(clipped.clip) * self.drawn(number, name, total.shape))
            / self.expected
            for name, total in sorted(clipped.sums.items())
        }
        return Release(mean, right.within)


@fails("noise_scale")
class NoNoise(Noise):
    def std(self, clip):
        return 0.0


@fails("noise_scale")
class NoiseWithoutClipNorm(Noise):
    def std(self, clip):
        return self.sum_multiplier


@fails("noise_scale")
class NoiseDividedTwice(Noise):
    def std(self, clip):
        return super().std(clip) / self.expected


@fails("noise_scale")
class NoiseOfTheRoot(Noise):
    """Divided by the root of the clients, as for a sum of their own noises."""

    def std(self, clip):
        return super().std(clip) / math.sqrt(self.expected)


@fails("noise_scale")
class NoiseSquared(Noise):
    """The variance where the standard deviation belongs."""

    def std(self, clip):
        return super().std(clip) ** 2


@fails("noise_scale")
class FirstTensorOnly(Noise):
    def drawn(self, number, name, shape):
        return super().drawn(number, name, shape) * (name == "a.A")


@fails("noise_scale")
class OneNumberPerTensor(Noise):
    def drawn(self, number, name, shape):
        return super().drawn(number, name, (1,) * len(shape)).expand(shape)


@fails("noise_scale")
class NoNoiseOnEmptyRounds(CentralGaussian):
    def round(self, number, updates, shapes, clip):
        if not list(updates):
            zeros = {name: torch.zeros(s, dtype=torch.float64) for name, s in shapes.items()}
            return Release(zeros, 0.5)
        return super().round(number, updates, shapes, clip)


@fails("noise_scale")
class NoiseBeforeClip(CentralGaussian):
    """Every update is noised, and clipped after that."""

    def round(self, number, updates, shapes, clip):
        source, noisy = self.source(number), []
        for update in updates:
            std = self.noise_multiplier * clip
            noisy.append(
                {k: t + std * source.normal(t.shape).to(t.dtype) for k, t in update.items()}
            )
        clipped = clipped_sum(noisy, shapes, clip)
        return Release({k: t / self.expected for k, t in clipped.sums.items()}, 0.5)


@fails("noise_independence")
class NoiseReused(Noise):
    """One draw for all rounds."""

    def drawn(self, number, name, shape):
        key = (id(self), name)
        if key not in KEPT:
            KEPT[key] = super().drawn(number, name, shape)
        return KEPT[key]


@fails("noise_independence")
class NoiseOfTheRunSeed(Noise):
    """Noise that whoever knows the job draws again."""

    def drawn(self, number, name, shape):
        return TestNoise(0, "central", number, name).normal(shape)


@fails("noise_independence")
class NoiseTheSameInEachTensor(Noise):
    def drawn(self, number, name, shape):
        key = (id(self), number)
        if name == "a.A":
            KEPT[key] = super().drawn(number, name, (4000,))
        return KEPT[key][: math.prod(shape)].reshape(shape)


@fails("adaptive_follows")
class FlowersSign(CentralGaussian):
    """Counts the updates that are clipped, and steps as if it were the others.

    https://github.com/flwrlabs/flower, serverapp/strategy/dp_adaptive_clipping.py
    """

    @property
    def adaptive(self):
        return self._kept and Wrong()

    @adaptive.setter
    def adaptive(self, value):
        object.__setattr__(self, "_kept", value)


class Wrong(AdaptiveClip):
    def next_clip(self, clip, within):
        return super().next_clip(clip, 1.0 - within)


@fails("adaptive_follows")
class ClipStandsStill(FlowersSign):
    @property
    def adaptive(self):
        return self._kept and Still()

    @adaptive.setter
    def adaptive(self, value):
        object.__setattr__(self, "_kept", value)


class Still(AdaptiveClip):
    def next_clip(self, clip, within):
        return clip


@fails("adaptive_cost")
class CountForFree(Noise):
    """The sum gets z, as if nothing else were released."""

    @property
    def sum_multiplier(self):
        return self.noise_multiplier


@fails("adaptive_cost")
class CountOfWholeClients(CentralGaussian):
    """b_j instead of b_j - 1/2: one client moves the count by 1, not by 1/2."""

    def round(self, number, updates, shapes, clip):
        release = super().round(number, updates, shapes, clip)
        if release.within is None:
            return release
        inside = sum(flat_norm(u) <= clip for u in updates)
        shifted = clipped_sum(updates, shapes, clip).within
        return replace(release, within=release.within + (inside - shifted) / self.expected)


@fails("adaptive_cost")
class CountWithoutNoise(CentralGaussian):
    def release(self, number, clipped):
        release = super().release(number, clipped)
        if release.within is None:
            return release
        tiny = 1e-3 * (release.within - 0.5 - clipped.within / self.expected)
        return replace(release, within=0.5 + clipped.within / self.expected + tiny)


KEPT = {}
