"""Private training with one fault each, and the oracle that must notice it.

A fault of the mechanism is a subclass of it; one of the trainer likewise. None is a mock: each
trains, and most look right from outside.
"""

import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from fedlora.data.example import IGNORE
from fedlora.privacy.audit.subject import Subject, open_ledger
from fedlora.privacy.ledger import Ledger
from fedlora.privacy.mechanism import Mechanism
from fedlora.privacy.noise import TestNoise
from fedlora.privacy.pieces import Whole
from fedlora.training.loss import predictions
from fedlora.training.private import PrivateTrainer


@dataclass(frozen=True)
class Mutant:
    """One fault.

    Attributes:
        make: the sound subject -> the faulty one.
        oracle: who must notice it; others may as well.
        kind: of the model that the fault needs, see `tests.privacy.models`.
    """

    make: Callable[[Subject], Subject]
    oracle: str
    kind: str = "llama"


def mechanism(oracle, kind="llama"):
    """Registers a faulty mechanism under its class's name."""

    def register(cls):
        faulty = dataclass(frozen=True)(cls)
        MUTANTS[_words(cls.__name__)] = Mutant(lambda s: replace(s, mechanism=faulty), oracle, kind)
        return faulty

    return register


def trainer(oracle, kind="llama"):
    def register(cls):
        MUTANTS[_words(cls.__name__)] = Mutant(lambda s: replace(s, trainer=cls), oracle, kind)
        return cls

    return register


def _words(name):
    return "".join(f" {c.lower()}" if c.isupper() else c for c in name).strip()


MUTANTS: dict[str, Mutant] = {}


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


class Clipped(Mechanism):
    """Another way to clip, from each example's whole gradient."""

    def weights(self, grads):
        """(N,) by parameter, from gradients (N, *shape) by parameter."""
        raise NotImplementedError

    def clipped(self, pieces):
        grads = {name: piece.whole() for name, piece in pieces.items()}
        weights = self.weights(grads)
        return {n: torch.tensordot(weights[n], g, 1) for n, g in grads.items()}

    def norms(self, grads):
        return torch.stack([g.flatten(1).square().sum(1) for g in grads.values()]).sum(0).sqrt()


def bounded(norms, clip):
    """The right factors for these norms, (N,)."""
    return torch.where(norms.isfinite(), (clip / (norms + 1e-6)).clamp_max(1.0), 0.0)


@mechanism("additivity")
class ClipOfTheBatch(Clipped):
    def weights(self, grads):
        count = len(next(iter(grads.values())))
        mean = torch.stack([g.mean(0).square().sum() for g in grads.values()]).sum().sqrt()
        return dict.fromkeys(grads, torch.ones(count) * min(1.0, self.clip / float(mean)))


@mechanism("additivity")
class ClipOfTheSumOfAMicroBatch(Mechanism):
    def clipped(self, pieces):
        sums = {name: piece.whole().sum(0) for name, piece in pieces.items()}
        norm = torch.stack([s.square().sum() for s in sums.values()]).sum().sqrt()
        return {name: s * min(1.0, self.clip / float(norm)) for name, s in sums.items()}


@mechanism("sensitivity")
class ClipByParameter(Clipped):
    def weights(self, grads):
        return {n: bounded(g.flatten(1).norm(dim=1), self.clip) for n, g in grads.items()}


@mechanism("sensitivity")
class LargestEntryAsNorm(Clipped):
    def weights(self, grads):
        norms = torch.stack([g.flatten(1).abs().amax(1) for g in grads.values()]).amax(0)
        return dict.fromkeys(grads, bounded(norms, self.clip))


@mechanism("sensitivity")
class NoClip(Clipped):
    def weights(self, grads):
        return dict.fromkeys(grads, torch.ones(len(next(iter(grads.values())))))


@mechanism("sensitivity")
class ClipAtTwiceTheNorm(Clipped):
    def weights(self, grads):
        return dict.fromkeys(grads, bounded(self.norms(grads), 2.0 * self.clip))


@mechanism("sensitivity")
class NormInHalfPrecision(Clipped):
    def weights(self, grads):
        norms = self.norms({n: g.bfloat16() for n, g in grads.items()}).float()
        return dict.fromkeys(grads, bounded(norms, self.clip))


@mechanism("sensitivity", "bert")
class HeadsOutsideOfTheClip(Clipped):
    def weights(self, grads):
        inside = {n: g for n, g in grads.items() if not n.startswith("classifier")}
        weights = bounded(self.norms(inside), self.clip)
        return {n: weights if n in inside else torch.ones_like(weights) for n in grads}


@mechanism("non-finite example")
class NonFiniteExampleDropsTheBatch(Mechanism):
    def clipped(self, pieces):
        sums = Mechanism.clipped(self, pieces)
        finite = all(bool(p.squared_norms().isfinite().all()) for p in pieces.values())
        return sums if finite else {name: torch.zeros_like(s) for name, s in sums.items()}


@mechanism("non-finite example")
class NonFiniteExamplePassesTheClip(Clipped):
    def weights(self, grads):
        factor = (self.clip / (self.norms(grads) + 1e-6)).clamp_max(1.0)
        return dict.fromkeys(grads, factor)


class Parts:
    """The gradients of a leaf's calls, whose squared norms are wrongly added."""

    def __init__(self, pieces):
        self.pieces = pieces

    def squared_norms(self):
        return sum(piece.squared_norms() for piece in self.pieces)

    def weighted_sum(self, weights, keep):
        return sum(piece.weighted_sum(weights, keep) for piece in self.pieces)


@trainer("denominator", "shared")
class NormsOfALeafCalledTwiceAddUp(PrivateTrainer):
    def clipped(self, listening, numbers, settings):
        held = {}

        def add(name, piece):
            held.setdefault(name, []).append(piece)
            listening._held[name] = Parts(held[name])

        vars(listening)["_add"] = add
        return super().clipped(listening, numbers, settings)


@mechanism("denominator")
class WeightDecayInsideTheClip(Clipped):
    def clipped(self, pieces):
        # the decay of a parameter whose entries are all 0.1
        shifted = {name: Whole(piece.whole() + 0.01) for name, piece in pieces.items()}
        return Mechanism.clipped(self, shifted)


@mechanism("denominator")
class DenominatorOfTheBatchDrawn(Mechanism):
    drawn: list = field(default_factory=list)

    def batch(self):
        self.drawn[:] = Mechanism.batch(self)
        return list(self.drawn)

    def released(self, sums, parameters):
        rate = max(1, len(self.drawn)) / self.examples
        return Mechanism.released(replace(self, rate=rate), sums, parameters)


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


def token_losses(trainer, inputs):
    """(n, T - 1), 0 where nothing is counted; and how many are."""
    logits, target = predictions(trainer.adapted.model, inputs, trainer.task)
    losses = torch.nn.functional.cross_entropy(logits, target, reduction="none")
    return losses.view(len(inputs.target), -1), int((target != IGNORE).sum())


@trainer("additivity")
class MeanOverTheTokensOfTheBatch(PrivateTrainer):
    """What transformers does when it is given labels; times n, as Opacus takes a mean."""

    def losses(self, inputs):
        losses, count = token_losses(self, inputs)
        return losses.sum(1) / max(1, count) * len(losses)


@trainer("denominator")
class SumOverTheTokensOfAnExample(PrivateTrainer):
    def losses(self, inputs):
        return token_losses(self, inputs)[0].sum(1)


@trainer("additivity")
class LossOverTheSizeOfTheMicroBatch(PrivateTrainer):
    def losses(self, inputs):
        return super().losses(inputs) / len(inputs.target)


@trainer("additivity")
class LastMicroBatchDropped(PrivateTrainer):
    def _sums(self, batch, listening, settings):
        size = settings.batch_size
        kept = batch[: (len(batch) - 1) // size * size] if len(batch) > size else batch
        return super()._sums(kept, listening, settings)


@trainer("denominator")
class OnlyTheLastMicroBatchCounts(PrivateTrainer):
    def _sums(self, batch, listening, settings):
        size = settings.batch_size
        last = batch[(len(batch) - 1) // size * size :] if batch else batch
        return super()._sums(last, listening, settings)


@mechanism("accounting")
class EmptyBatchesDrawnAgain(Mechanism):
    def batch(self):
        batch = Mechanism.batch(self)
        return batch or self.batch()


def ledger(oracle):
    def register(cls):
        MUTANTS[_words(cls.__name__)] = Mutant(
            lambda s: replace(s, ledger=lambda folder: open_ledger(folder, cls)), oracle
        )
        return cls

    return register


@ledger("accounting")
class AccountantNeverAdvanced(Ledger):
    def reserve(self, release, events, details=None):
        super().reserve(release, [replace(event, steps=0) for event in events], details)

    def spend(self, release, events_actual, payload, details=None):
        nothing = [replace(event, steps=0) for event in events_actual]
        super().spend(release, nothing, payload, details)


@ledger("accounting")
class NoiseOverstated(Ledger):
    def charged(self, run=None):
        return [replace(event, noise=1.1 * event.noise) for event in super().charged(run)]


@ledger("accounting")
class EmptyStepsNotCharged(Ledger):
    def spend(self, release, events_actual, payload, details=None):
        fewer = [replace(event, steps=event.steps - 1) for event in events_actual]
        super().spend(release, fewer, payload, details)


def afresh(folder):
    return open_ledger(Path(tempfile.mkdtemp(dir=folder)))


MUTANTS["accountant reset on restart"] = Mutant(lambda s: replace(s, ledger=afresh), "accounting")
