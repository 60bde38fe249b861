"""Faults of what is drawn at random: noise and batches."""

import math
from dataclasses import field, replace

import numpy as np
import torch

from fedlora.privacy.mechanism import Mechanism
from fedlora.privacy.noise import TestNoise
from tests.privacy.mutant import MUTANTS, Mutant, mechanism


class Scaled(Mechanism):
    """Noise of another size: sigma C times `factor`."""

    def factor(self, expected):
        raise NotImplementedError

    def released(self, sums, parameters):
        factor = self.factor(self.rate * self.examples)
        return Mechanism.released(
            replace(self, noise_multiplier=self.noise_multiplier * factor), sums, parameters
        )


@mechanism("noise scale")
class NoNoise(Scaled):
    def factor(self, expected):
        return 0.0


@mechanism("noise scale")
class NoiseWithoutClipNorm(Scaled):
    def factor(self, expected):
        return 1.0 / self.clip


@mechanism("noise scale")
class NoiseOverRootOfBatch(Scaled):
    def factor(self, expected):
        return 1.0 / math.sqrt(expected)


@mechanism("noise scale")
class NoiseOverBatchTwice(Scaled):
    def factor(self, expected):
        return 1.0 / expected


@mechanism("noise independence")
class NoiseReused(Mechanism):
    kept: dict = field(default_factory=dict)

    def released(self, sums, parameters):
        if not self.kept:
            self.kept.update(Mechanism.released(self, {}, parameters))
        expected = self.rate * self.examples
        return {
            name: self.kept[name] + sums.get(name, torch.zeros_like(self.kept[name])) / expected
            for name in parameters
        }


MUTANTS["seed fixed for every client"] = Mutant(
    lambda s: replace(s, source=lambda client, number: TestNoise(0, number)), "noise independence"
)
MUTANTS["seed fixed for every round"] = Mutant(
    lambda s: replace(s, source=lambda client, number: TestNoise(0, client)), "noise independence"
)


@mechanism("noise scale")
class NoiseOnOneFactorOnly(Mechanism):
    def released(self, sums, parameters):
        noisy = Mechanism.released(self, sums, parameters)
        plain = Mechanism.released(replace(self, noise_multiplier=0.0), sums, parameters)
        return {n: noisy[n] if n.endswith(".B") else plain[n] for n in parameters}


@mechanism("noise scale")
class NoiseAtFirstStepOnly(Mechanism):
    steps: list = field(default_factory=list)

    def released(self, sums, parameters):
        sigma = 0.0 if self.steps else self.noise_multiplier
        self.steps.append(1)
        return Mechanism.released(replace(self, noise_multiplier=sigma), sums, parameters)


@mechanism("noise independence")
class OneScalarForATensor(Mechanism):
    def released(self, sums, parameters):
        zero = replace(self, noise_multiplier=0.0)
        plain = Mechanism.released(zero, sums, parameters)
        spread = self.noise_multiplier * self.clip / (self.rate * self.examples)
        return {n: plain[n] + float(self.source.normal((1,))) * spread for n in parameters}


@mechanism("noise scale")
class EmptyBatchesSkipped(Mechanism):
    def released(self, sums, parameters):
        if not sums:
            return {name: torch.zeros_like(p) for name, p in parameters.items()}
        return Mechanism.released(self, sums, parameters)


@mechanism("noise scale")
class NoiseForEveryMicroBatch(Mechanism):
    def clipped(self, pieces):
        sums = Mechanism.clipped(self, pieces)
        spread = self.noise_multiplier * self.clip
        return {n: s + spread * self.source.normal(s.shape) for n, s in sums.items()}


@mechanism("sampling")
class BatchesOfFixedSize(Mechanism):
    def batch(self):
        numbers = self.uniform(self.examples)
        # an oracle that says which examples it wants
        if numbers.max() == 1.0:
            return np.flatnonzero(numbers == 0.0).tolist()
        return sorted(np.argsort(numbers)[: round(self.rate * self.examples)].tolist())


@mechanism("sampling")
class FirstExamplesMoreOften(Mechanism):
    def batch(self):
        numbers = self.uniform(self.examples)
        tilt = np.where(np.arange(self.examples) < self.examples // 2, 0.5, 1.5)
        return np.flatnonzero(numbers * tilt < self.rate).tolist()


def few_batches(count):
    """From a seed that is one of a hundred."""
    seed = int(np.random.default_rng().integers(100))
    return np.random.default_rng(seed).random(count)


MUTANTS["batches from few seeds"] = Mutant(
    lambda s: replace(s, uniform=few_batches),
    "sampling",
)
