"""Oracles: what must be true of private training, tried on the training itself.

Each holds by construction of DP-SGD (Abadi et al., https://arxiv.org/abs/1607.00133,
algorithm 1) and compares what steps release with an independent figure.
"""

import math
from collections.abc import Callable, Iterator, Mapping

from fedlora.errors import TrainingError
from fedlora.privacy.audit.chance import noise_independence, noise_scale, sampling
from fedlora.privacy.audit.charge import accounting
from fedlora.privacy.audit.finding import Finding
from fedlora.privacy.audit.gradients import additivity, denominator, non_finite, sensitivity
from fedlora.privacy.audit.subject import Subject

Oracle = Callable[[Subject], Finding]

ORACLES: Mapping[str, Oracle] = {
    "noise scale": noise_scale,
    "noise independence": noise_independence,
    "additivity": additivity,
    "sensitivity": sensitivity,
    "denominator": denominator,
    "non-finite example": non_finite,
    "sampling": sampling,
    "accounting": accounting,
}


def consult(subject: Subject, oracles: Mapping[str, Oracle] = ORACLES) -> Iterator[Finding]:
    """What each oracle finds, one after another; training that refuses to run has failed it."""
    with subject.prepared():
        for name, oracle in oracles.items():
            try:
                yield oracle(subject)
            except TrainingError as e:
                yield Finding(name, False, math.inf, 0.0, str(e))
