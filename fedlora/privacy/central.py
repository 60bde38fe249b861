"""Client-level differential privacy: clipped updates, their sum, and noise, at the server.

McMahan et al., "Learning Differentially Private Recurrent Language Models",
https://arxiv.org/abs/1710.06963, algorithm 1. Of N enrolled clients each takes part with
probability q. With u_j all that client j sends minus what it started from,

    release = (sum_j u_j min(1, S / ||u_j||) + N(0, z^2 S^2 I)) / (q N)

The norm is over all tensors together. All clients count alike, and the denominator is a
constant: divided by the number of replies, the sum would be scaled by something that one
client changes. A client that does not answer, or whose update is refused, is a zero.

S may follow the median of the norms, see `AdaptiveClip`.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from fedlora.adapter import Tensors
from fedlora.privacy.noise import NoiseSource

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class ClippedSum:
    """What one round's clients send, before noise. Never leaves the server.

    Attributes:
        sums: name -> sum of the clipped updates, float64; zeros without clients.
        within: sum_j (b_j - 1/2), b_j = 1 where ||u_j|| <= S and else 0.
        clip: S.
    """

    sums: dict[str, Tensor]
    within: float
    clip: float


@dataclass(frozen=True)
class Release:
    """What one round gives away.

    Attributes:
        mean: name -> noisy mean update, float64.
        within: noisy fraction of updates that were not clipped; None where S is fixed.
    """

    mean: dict[str, Tensor] = field(repr=False)
    within: float | None = None


class Mechanism(Protocol):
    """What stands between a round's clipped sum and the rest of the world."""

    def release(self, number: int, clipped: ClippedSum) -> Release:
        """The only thing that may be kept of round `number`."""
        ...


@dataclass(frozen=True)
class AdaptiveClip:
    """S follows a quantile of the clients' norms, from a noisy count.

    Andrew et al., "Differentially Private Learning with Adaptive Clipping",
    https://arxiv.org/abs/1905.03871, algorithm 1: with b the noisy fraction of updates that
    are *not* clipped, S <- S exp(-rate (b - quantile)). Counted as b_j - 1/2, one client moves
    the count by 1/2, and count and sum together cost what the sum alone would cost with noise
    multiplier z if the sum gets z_sum = (z^-2 - (2 s)^-2)^(-1/2), s the noise of the count
    (theorem 1 there). A client that does not answer moves the count by nothing.

    Attributes:
        quantile: the part of the updates that shall not be clipped.
        rate: learning rate of log S.
    """

    quantile: float = 0.5
    rate: float = 0.2

    def count_noise(self, noise_multiplier: float, expected: float) -> float:
        """Standard deviation s of the noise on the count, in clients.

        expected / 20 as in the paper, section 3.1, but at least z, where the sum gets 15 %
        more noise: a smaller s would leave the sum none of the budget.
        """
        return max(expected / 20, noise_multiplier)

    def sum_multiplier(self, noise_multiplier: float, expected: float) -> float:
        """z_sum: the noise multiplier of the sum when count and sum shall cost z."""
        count = 2 * self.count_noise(noise_multiplier, expected)
        return 1.0 / math.sqrt(noise_multiplier**-2 - count**-2)

    def next_clip(self, clip: float, within: float) -> float:
        """S of the next round.

        Args:
            clip: S of this one.
            within: noisy fraction that was not clipped.
        """
        # what lies outside of [0, 1] is noise, which could move S by any factor
        return clip * math.exp(-self.rate * (min(max(within, 0.0), 1.0) - self.quantile))


@dataclass(frozen=True)
class CentralGaussian:
    """Independent Gaussian noise of every round.

    Attributes:
        noise_multiplier: z that is accounted for.
        expected: q N, the constant that sums are divided by.
        source: round -> where its noise comes from.
        adaptive: how S follows the norms; None keeps it.
    """

    noise_multiplier: float
    expected: float
    source: Callable[[int], NoiseSource]
    adaptive: AdaptiveClip | None = None

    @property
    def sum_multiplier(self) -> float:
        """Standard deviation of the noise on the sum, in units of S."""
        if self.adaptive is None:
            return self.noise_multiplier
        return self.adaptive.sum_multiplier(self.noise_multiplier, self.expected)

    def round(
        self, number: int, updates: Iterable[Tensors], shapes: Shapes, clip: float
    ) -> Release:
        """Clips, sums and releases; see `clipped_sum`."""
        return self.release(number, clipped_sum(updates, shapes, clip))

    def release(self, number: int, clipped: ClippedSum) -> Release:
        """See `Mechanism.release`; the noise is drawn anew at every call."""
        source = self.source(number)
        std = self.sum_multiplier * clipped.clip
        mean = {
            name: (total + std * source.normal(total.shape)) / self.expected
            for name, total in sorted(clipped.sums.items())
        }
        if self.adaptive is None:
            return Release(mean)
        spread = self.adaptive.count_noise(self.noise_multiplier, self.expected)
        count = clipped.within + spread * float(source.normal(()))
        return Release(mean, 0.5 + count / self.expected)


def clipped_sum(updates: Iterable[Tensors], shapes: Shapes, clip: float) -> ClippedSum:
    """Sums updates, each scaled to an L2 norm of at most `clip` over all its tensors.

    Args:
        updates: trained minus broadcast, of each client that answered; read twice, tensor by
            tensor. One that is not finite counts as a client that did not answer.
        shapes: name and shape of every tensor that a client sends; the sum has all of these,
            whoever answered, so that noise reaches each.
        clip: S.
    """
    sums = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in shapes.items()}
    within = 0.0
    for update in updates:
        norm = flat_norm(update)
        if not math.isfinite(norm):
            continue
        within += 0.5 if norm <= clip else -0.5
        share = 1.0 if norm <= clip else clip / norm
        for name, total in sums.items():
            total += share * update[name].double()
    return ClippedSum(sums, within, clip)


def flat_norm(update: Tensors) -> float:
    """L2 norm over all tensors together, computed in float64."""
    squares = (float(torch.sum(tensor.double() ** 2)) for tensor in update.values())
    return math.sqrt(math.fsum(squares))
