"""Subject: private training as the oracles see it, by what it adds to the parameters.

Nothing is read that training itself computes. A subject is begun from the same adapter again
and again; what a step released is the movement of the parameters over the learning rate.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedlora.adapters.inject import AdaptedModel
from fedlora.config.job import TrainingSection
from fedlora.data.example import Example, collate
from fedlora.privacy.ledger import Ledger
from fedlora.privacy.mechanism import Mechanism
from fedlora.privacy.noise import NoiseSource, OsNoise
from fedlora.privacy.sampling import Uniform, secret_uniform
from fedlora.seeds import generator
from fedlora.training.loss import loss_sum
from fedlora.training.mode import training_mode
from fedlora.training.private import PrivateTrainer
from fedlora.training.trainer import LocalWork

MICRO = 2
"""Examples of a micro-batch: few, so that a batch is several of them."""
DELTA = 1e-5
"""Of the audited ledger."""
# large beside the parameters, so that their rounding does not show in how they move
_RATE = 1024.0
# of the random part of the adapter that is audited: without one, some gradients are zero
_SPREAD = 0.05


@dataclass(frozen=True)
class Subject:
    """Clients that train by DP-SGD on a few examples.

    Attributes:
        adapted: the model; left as it is found by `prepared`.
        examples: at least 6, of unequal length if they are texts.
        task: the model's task.
        pad_id: padding token.
        factors: factors that are trained.
        checkpointing: activations are recomputed.
        per_sample: see `privacy.per_sample`.
        trainer: the private trainer.
        mechanism: the mechanism that it is given.
        ledger: opens the privacy ledger in a folder, at the first time or again.
        source: (client, round) -> source of the noise.
        uniform: what batches are taken by, where an oracle does not say.
    """

    adapted: AdaptedModel
    examples: Sequence[Example]
    task: str
    pad_id: int
    factors: tuple[str, ...]
    checkpointing: bool = False
    per_sample: str = "auto"
    trainer: type[PrivateTrainer] = PrivateTrainer
    mechanism: type[Mechanism] = Mechanism
    ledger: Callable[[Path], Ledger] = field(default=lambda folder: open_ledger(folder))
    source: Callable[[str, int], NoiseSource] = field(default=lambda client, number: OsNoise())
    uniform: Uniform = secret_uniform

    @property
    def exact(self) -> bool:
        """Whether the base computes in float32 or wider, so that examples add up exactly."""
        return all(
            torch.finfo(p.dtype).eps <= torch.finfo(torch.float32).eps
            for p in self.adapted.model.parameters()
            if p.is_floating_point()
        )

    @contextmanager
    def prepared(self) -> Iterator["Subject"]:
        """Inside, the adapter is one on which no gradient vanishes; afterwards what it was."""
        before = self.adapted.state().tensors
        stream = generator(0, "audited adapter")
        moved = {}
        for name, tensor in before.items():
            draw = torch.randn(tensor.shape, generator=stream, dtype=torch.float64)
            moved[name] = tensor + (_SPREAD * draw).to(tensor.dtype)
        self.adapted.load(moved)
        try:
            yield self
        finally:
            self.adapted.load(before)

    def released(
        self,
        batches: "Sequence[Sequence[int]] | Taking",
        *,
        clip: float,
        noise: float,
        expected: float,
        client: str = "client-0",
        number: int = 1,
    ) -> list[dict[str, Tensor]]:
        """What each step releases, by parameter, in float64 on the CPU.

        Args:
            batches: the examples of every step.
            clip: C.
            noise: sigma.
            expected: b, the expected size of a batch.
            client, number: name the source of the noise.
        """
        taking = batches if isinstance(batches, Taking) else Taking(batches)
        steps = len(taking.batches)
        mechanism = self.mechanism(
            examples=len(self.examples),
            rate=expected / len(self.examples),
            clip=clip,
            noise_multiplier=noise,
            source=self.source(client, number),
            uniform=taking,
            per_sample=self.per_sample,
        )
        trainer = self.trainer(
            self.adapted, self.examples, mechanism, task=self.task, pad_id=self.pad_id
        )
        start = self.adapted.state().tensors
        places: list[Mapping[str, Tensor]] = []
        work = LocalWork(
            factors=self.factors,
            steps=steps,
            first_step=0,
            total_steps=max(1, steps),
            seed=0,
            client=client,
            round=number,
            progress=lambda done, planned: places.append(self.adapted.state().tensors),
        )
        try:
            trainer.train(work, self.settings())
            places.append(self.adapted.state().tensors)
        finally:
            self.adapted.load(start)
        names = self.adapted.train_only(self.factors)
        return [
            {name: (old[name].double() - new[name].double()) / _RATE for name in names}
            for old, new in pairwise(places)
        ]

    def sums(self, batch: Sequence[int], clip: float, expected: float = 3.0) -> dict[str, Tensor]:
        """The clipped sum over a batch, from a step without noise."""
        released = self.released([batch], clip=clip, noise=0.0, expected=expected)[0]
        return {name: expected * tensor for name, tensor in released.items()}

    def gradient(self, index: int) -> dict[str, Tensor]:
        """One example's gradient by plain autograd, alone and without padding."""
        parameters = self.adapted.train_only(self.factors)
        device = next(self.adapted.model.parameters()).device
        with training_mode(self.adapted, checkpointing=False):
            batch = collate([self.examples[index]], self.pad_id).to(device)
            part = loss_sum(self.adapted.model, batch, self.task)
            found = torch.autograd.grad(part.total / max(1, part.count), list(parameters.values()))
        return {name: g.double().cpu() for name, g in zip(parameters, found, strict=True)}

    def settings(self) -> TrainingSection:
        """Plain SGD, so that a step moves the parameters by what it releases."""
        return TrainingSection(
            optimizer="sgd",
            learning_rate=_RATE,
            batch_size=MICRO,
            gradient_checkpointing=self.checkpointing,
        )

    @contextmanager
    def spoilt(self) -> Iterator[None]:
        """Inside, the loss of the first example of the first micro-batch is not a number."""
        calls = 0

        def spoil(module: Any, args: Any, output: Any) -> None:
            nonlocal calls
            if calls == 0:
                scale = torch.ones_like(output.logits)
                scale[0] = torch.nan
                output.logits = output.logits * scale
            calls += 1

        handle = self.adapted.model.register_forward_hook(spoil)
        try:
            yield
        finally:
            handle.remove()


class Taking:
    """Uniform numbers with which Poisson sampling takes given batches, one after another.

    Attributes:
        batches: these; afterwards it takes every example.
        drawn: how often it was asked.
    """

    def __init__(self, batches: Sequence[Sequence[int]]) -> None:
        self.batches = batches
        self.drawn = 0

    def __call__(self, count: int) -> "np.ndarray[tuple[int], np.dtype[np.float64]]":
        """See `Uniform`."""
        left = self.drawn < len(self.batches)
        numbers = np.ones(count)
        numbers[list(self.batches[self.drawn]) if left else slice(None)] = 0.0
        self.drawn += 1
        return numbers


def open_ledger(folder: Path, kind: type[Ledger] = Ledger) -> Ledger:
    """The ledger of the audited examples, without a budget."""
    return kind.open(folder, "0" * 16, unit="record", epsilon=None, delta=DELTA)
