"""Many adapters, each on examples of its own, scored in shared forward passes over one base."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fedlora.adapter import Tensors
from fedlora.adapters.inject import AdaptedModel
from fedlora.adapters.stacked import StackedModel
from fedlora.data.example import Batch, Example
from fedlora.evaluate import Tally, batches, evaluating
from fedlora.training.cohort import join
from fedlora.training.loss import token_losses
from fedlora.training.memory import Shares


@dataclass(frozen=True)
class Trial:
    """One adapter and what it is scored on.

    Attributes:
        tensors: every factor and head, of the model's present spec.
        examples: any number of them.
    """

    tensors: Tensors
    examples: Sequence[Example]


def tally_many(
    adapted: AdaptedModel,
    trials: Sequence[Trial],
    *,
    task: str,
    pad_id: int,
    batch_size: int,
    width: int,
) -> list[Tally]:
    """What `evaluate` would sum up for each trial alone, up to rounding, in the given order.

    A trial whose examples are all done takes no part in later passes. Tensors that do not
    differ between the trials are held once, so that one adapter on many clients' examples is
    the plain model. They stay in the model, whose other tensors are as they were.

    Args:
        adapted: the model, without an `obstacle`.
        task: the model's task.
        pad_id: padding token.
        batch_size: examples of one trial in one pass.
        width: most trials in one pass; halved when memory runs out.
    """
    found = [Tally() for _ in trials]
    # who has more batches comes first, so that the active ones are always the first rows
    order = sorted(
        (place for place, trial in enumerate(trials) if trial.examples),
        key=lambda place: -len(trials[place].examples),
    )
    if not order:
        return found
    tallies = [found[place] for place in order]
    sources = [batches(trials[place].examples, pad_id, batch_size) for place in order]
    steps = [-(-len(trials[place].examples) // batch_size) for place in order]
    first, *others = (trials[place].tensors for place in order)
    parameters = adapted.parameters()
    values = {
        name: torch.stack([tensors[name] for tensors in (first, *others)]).to(parameters[name])
        for name in parameters
        if not all(_same(first[name], tensors[name]) for tensors in others)
    }
    adapted.load({name: value for name, value in first.items() if name not in values})
    shares = Shares(width)
    with evaluating(adapted.model), StackedModel(adapted, values) as stacked:
        for step in range(steps[0]):
            active = sum(count > step for count in steps)
            now = [next(source) for source in sources[:active]]

            def score(rows: slice, now: Sequence[Batch] = now) -> list[list[float]]:
                stacked.hold({name: value[rows] for name, value in values.items()})
                batch = join(now[rows], pad_id).to(next(iter(parameters.values())).device)
                each = token_losses(adapted.model, batch, task)
                sums = (each.losses, each.counted, each.right)
                size = rows.stop - rows.start
                return [part.view(size, -1).sum(1).tolist() for part in sums]

            for rows, (totals, counts, corrects) in shares.each(active, score):
                for tally, total, count, correct in zip(
                    tallies[rows], totals, counts, corrects, strict=True
                ):
                    tally.add(total, int(count), int(correct))
    return found


def _same(left: torch.Tensor, right: torch.Tensor) -> bool:
    return left is right or torch.equal(left, right)
