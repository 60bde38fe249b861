"""CohortLink: every client in this process, and several of them in each pass of the model."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field

from fedlora.adapters.inject import AdaptedModel
from fedlora.client.site import Course
from fedlora.config.job import Job
from fedlora.server.link import Reply
from fedlora.simulation.clients import Answer, failure
from fedlora.simulation.scenario import Scenario
from fedlora.simulation.virtual import Asked, VirtualLink
from fedlora.training.cohort import Cohort
from fedlora.training.private_cohort import PrivateCohort
from fedlora.training.trainer import LocalResult, Training
from fedlora.wire import encode_update

# (client, manifest, fetch) -> the course of one client's part of a round
Begin = Callable[[str, bytes, Callable[[str], bytes]], Course]


@dataclass
class _Turn:
    """One client's part of a round, under way."""

    asked: Asked
    fetched: set[str] = field(default_factory=set)
    course: Course | None = None
    training: Training | None = None
    answer: Answer | None = None

    def fetch(self, digest: str) -> bytes:
        self.fetched.add(digest)
        return self.asked.parts[digest]


class CohortLink(VirtualLink):
    """Runs the tasks of a round side by side; see `Cohort`.

    Args:
        scenario: who exists, who is absent, slow or hostile.
        begin: begins one client's part of a round.
        adapted: the model of all clients.
        job: the run's job.
        pad_id: padding token.
        width: clients that are trained together.
        progress: called with a client's name when its work begins.
    """

    def __init__(
        self,
        scenario: Scenario,
        begin: Begin,
        adapted: AdaptedModel,
        job: Job,
        pad_id: int,
        width: int,
        progress: Callable[[str], None] | None = None,
    ) -> None:
        super().__init__(scenario, progress)
        self.begin = begin
        self.adapted = adapted
        self.job = job
        self.pad_id = pad_id
        self.width = width
        self._waiting: list[Asked] = []

    def close(self) -> None:
        """There is nothing to let go of."""

    def _begin(self, asked: Asked) -> Iterator[Reply]:
        self._waiting.append(asked)
        # whoever waits for its training holds an adapter, and no more than that many do
        if len(self._waiting) == self.width:
            yield from self._rest()

    def _rest(self) -> Iterator[Reply]:
        waiting, self._waiting = self._waiting, []
        for asked, answer in zip(waiting, self._answers(waiting), strict=True):
            yield self._reply(asked, answer)

    def _answer(self, asked: Asked) -> Answer:
        return self._answers([asked])[0]

    def _answers(self, waiting: Sequence[Asked]) -> list[Answer]:
        turns = [_Turn(asked) for asked in waiting]
        with ExitStack() as courses:
            for turn in turns:
                self.progress(turn.asked.client)
                self._start(turn)
                if turn.course is not None:
                    courses.enter_context(closing(turn.course))
            while ready := [turn for turn in turns if turn.training is not None]:
                group = [turn for turn in ready if _together(turn, ready[0])]
                for turn, result in zip(group, self._train(group), strict=True):
                    self._go_on(turn, result)
        return [turn.answer for turn in turns if turn.answer is not None]

    def _train(self, group: Sequence[_Turn]) -> Sequence[LocalResult | Exception]:
        trainings = [turn.training for turn in group if turn.training is not None]
        # all of a job are private, or none is
        kind = Cohort if trainings[0].mechanism is None else PrivateCohort
        cohort = kind(
            self.adapted,
            trainings,
            self.job.training,
            task=self.job.model.task,
            pad_id=self.pad_id,
            width=self.width,
        )
        try:
            return cohort.train()
        except Exception as e:  # memory that ran out for a single client, say
            return [e] * len(group)

    def _start(self, turn: _Turn) -> None:
        def first() -> Training:
            task = turn.asked.task
            turn.course = self.begin(task.client, task.manifest, turn.fetch)
            return next(turn.course)

        self._step(turn, first)

    def _go_on(self, turn: _Turn, result: LocalResult | Exception) -> None:
        course = turn.course
        assert course is not None, "a turn that trains has begun"
        if isinstance(result, Exception):
            self._step(turn, lambda: course.throw(result))
        else:
            self._step(turn, lambda: course.send(result))

    def _step(self, turn: _Turn, step: Callable[[], Training]) -> None:
        """Takes a client's work as far as its next training, or to its answer."""
        turn.training = None
        try:
            turn.training = step()
        except StopIteration as end:
            try:
                manifest, payload = encode_update(self.scenario.tamper(end.value))
                turn.answer = Answer(manifest, payload, frozenset(turn.fetched))
            except Exception as e:
                turn.answer = failure(e, turn.fetched)
        except Exception as e:
            turn.answer = failure(e, turn.fetched)


def _together(turn: _Turn, other: _Turn) -> bool:
    """Their trainings can share a pass of the model."""
    one, two = turn.training, other.training
    if one is None or two is None:
        return False
    return (
        one.start.spec == two.start.spec
        and one.fold.keys() == two.fold.keys()
        and one.work.factors == two.work.factors
        and one.work.rates == two.work.rates
    )
