"""Noisy figures of a client's own validation: all that may be said of them under privacy."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from fedlora.privacy.noise import NoiseSource

MAX_LOSS = 10.0
"""Nats that one example's loss is clipped to."""


def noisy_means(
    losses: Tensor, correct: Tensor, noise_multiplier: float, source: NoiseSource
) -> Mapping[str, float]:
    """Mean loss (nats) and accuracy over n examples, by one Gaussian mechanism.

    Of (sum of losses / MAX_LOSS, number correct) one example changes each entry by at most 1,
    so that its share is at most sqrt(2) long. n itself is taken to be public.

    Args:
        losses: each example's mean loss in nats, (n,); one that is not finite counts MAX_LOSS.
        correct: whether an example is right, (n,), 0 to 1.
        noise_multiplier: standard deviation in units of that length.
        source: of the noise.
    """
    clipped = torch.nan_to_num(losses.double(), nan=MAX_LOSS).clamp(0.0, MAX_LOSS) / MAX_LOSS
    sums = torch.stack([clipped.sum(), correct.double().clamp(0.0, 1.0).sum()])
    noisy = sums + noise_multiplier * math.sqrt(2.0) * source.normal((2,)).to(sums.device)
    count = max(1, len(losses))
    return {
        "validation_loss": MAX_LOSS * float(noisy[0]) / count,
        "validation_accuracy": float(noisy[1]) / count,
    }
