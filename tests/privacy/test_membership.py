"""Guessing members by their loss: possible without noise, and no longer with it.

A smoke test of the attack of Yeom et al., https://arxiv.org/abs/1709.01604, and of
calibration by the loss before training (Watson et al., https://arxiv.org/abs/2111.08440): it
cannot prove that training is private, only that the proof is about something real.
"""

import pytest
import torch

from fedlora.data.example import IGNORE, Example, collate
from fedlora.privacy.accounting import Event, epsilon, noise_for
from fedlora.privacy.mechanism import Mechanism
from fedlora.privacy.noise import TestNoise
from fedlora.privacy.sampling import seeded_uniform
from fedlora.training.loss import example_losses
from fedlora.training.private import PrivateTrainer
from fedlora.training.trainer import LocalWork
from tests.adapters.cases import seeded
from tests.privacy.models import make
from tests.privacy.subjects import subject

torch.set_num_threads(1)
COUNT, STEPS, RATE, DELTA = 100, 60, 0.25, 1e-5


def canaries():
    """Twice COUNT random texts, of which nothing can be learnt but themselves."""
    ids = torch.randint(1, 50, (2 * COUNT, 6), generator=seeded(11))
    rows = []
    for row in ids:
        target = row.clone()
        target[0] = IGNORE
        rows.append(Example({"input_ids": row}, target))
    return rows


def losses(made, rows):
    made.adapted.model.eval()
    with torch.no_grad():
        return example_losses(made.adapted.model, collate(rows, 0), made.task)


def area(inside, outside):
    """Probability that a member scores above a non-member."""
    wins = (inside[:, None] > outside[None, :]).double()
    ties = (inside[:, None] == outside[None, :]).double()
    return float((wins + 0.5 * ties).mean())


def attacked(noise):
    """Area under the attack's curve."""
    made, rows = make("llama", rank=8), canaries()
    before = losses(made, rows)
    mechanism = Mechanism(
        examples=COUNT,
        rate=RATE,
        clip=1.0,
        noise_multiplier=noise,
        source=TestNoise(1, "members"),
        uniform=seeded_uniform(1, "members"),
    )
    trainer = PrivateTrainer(made.adapted, rows[:COUNT], mechanism, task=made.task, pad_id=0)
    work = LocalWork(
        factors=("A", "B"),
        steps=STEPS,
        first_step=0,
        total_steps=STEPS,
        seed=0,
        client="client-0",
        round=1,
    )
    changes = {"optimizer": "adamw", "learning_rate": 0.02, "batch_size": 50}
    trainer.train(work, subject("llama").settings().model_copy(update=changes))
    gained = before - losses(made, rows)
    return area(gained[:COUNT], gained[COUNT:])


def test_members_show_without_noise():
    assert attacked(0.0) > 0.8


def test_members_do_not_show_at_epsilon_2():
    noise = noise_for(2.0, DELTA, RATE, STEPS)
    assert epsilon([Event(RATE, noise, STEPS)], DELTA) <= 2.0
    assert attacked(noise) == pytest.approx(0.5, abs=0.1)
