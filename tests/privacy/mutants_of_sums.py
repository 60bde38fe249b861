"""Faults of the clipped sum and of what it is divided by."""

from dataclasses import field, replace

import torch

from fedlora.privacy.mechanism import Mechanism
from fedlora.privacy.pieces import Whole
from fedlora.training.loss import token_losses
from fedlora.training.private import PrivateTrainer
from tests.privacy.mutant import mechanism, trainer


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

    def weighted_sum(self, weights):
        return sum(piece.weighted_sum(weights) for piece in self.pieces)


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


@trainer("additivity")
class MeanOverTheTokensOfTheBatch(PrivateTrainer):
    """What transformers does when it is given labels; times n, as Opacus takes a mean."""

    def losses(self, inputs):
        found = token_losses(self.adapted.model, inputs, self.task)
        count = max(1, int(found.counted.sum()))
        return found.losses.sum(1) / count * len(found.losses)


@trainer("denominator")
class SumOverTheTokensOfAnExample(PrivateTrainer):
    def losses(self, inputs):
        return token_losses(self.adapted.model, inputs, self.task).losses.sum(1)


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
