"""Figures of clients' adapters, several of them in each pass of the model where that is faster."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fedlora.adapter import AdapterState
from fedlora.data.example import Example
from fedlora.evaluate_many import Trial, tally_many
from fedlora.server.run import Run, Scores, finite
from fedlora.simulation.cohort_rule import evaluation_width


@dataclass(frozen=True)
class Judged:
    """An adapter and what it is scored on.

    Attributes:
        adapter: makes or reads it when its turn comes, so that few are in memory.
        examples: any number of them.
    """

    adapter: Callable[[], AdapterState]
    examples: list[Example]


def score_each(run: Run, judged: Sequence[Judged]) -> list[Scores]:
    """The figures of every adapter, as `Run.scores` has them for one.

    Args:
        run: whose model and job it is.
        judged: their adapters are all of one spec.

    Returns:
        in the order given; nothing where nothing counts.
    """
    width = evaluation_width(run.job, run.loaded).clients
    found: list[Scores] = []
    if width == 1:
        for one in judged:
            run.hold(one.adapter())
            found.append(run.scores(one.examples))
        return found
    for begin in range(0, len(judged), width):
        found += _together(run, judged[begin : begin + width])
    return found


def _together(run: Run, group: Sequence[Judged]) -> list[Scores]:
    job, loaded = run.job, run.loaded
    adapters = [one.adapter() for one in group]
    run.hold(adapters[0])
    tallies = tally_many(
        loaded.adapted,
        [
            Trial(adapter.tensors, one.examples)
            for adapter, one in zip(adapters, group, strict=True)
        ],
        task=job.model.task,
        pad_id=loaded.processor.pad_id,
        batch_size=job.evaluation.batch_size,
        width=len(group),
    )
    return [
        finite(tally.figures(one.examples, job.model.task))
        for tally, one in zip(tallies, group, strict=True)
    ]


def mean_scores(scores: Sequence[Scores]) -> Scores:
    """The mean of every figure that all have."""
    shared = set.intersection(*(set(found) for found in scores))
    return {key: sum(found[key] for found in scores) / len(scores) for key in sorted(shared)}
