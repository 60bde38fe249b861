"""What a budget costs before anything is trained: the noise it needs, and how much that is."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from fedlora.config.job import Job
from fedlora.config.privacy import PrivacySection
from fedlora.privacy.accounting import Event, check_delta, default_delta, epsilon, noise_for

SCALES = (0.5, 1.0, 2.0, 4.0)


@dataclass(frozen=True)
class Schedule:
    """How often which part of the units is used.

    Attributes:
        unit: "record" or "client": what is protected.
        units: n, how many there are.
        batch: expected units in a step; no more than n.
        rounds: of the run.
        steps: noisy steps in a round.
        delta: of the budget.
        amplified: every step takes each unit with probability batch / n, drawn in secret;
            otherwise all steps count as if they took all.
        figures: what is released beside the steps, over the whole run.
    """

    unit: str
    units: int
    batch: float
    rounds: int
    steps: int
    delta: float
    amplified: bool = True
    figures: tuple[Event, ...] = field(default=())

    def __post_init__(self) -> None:
        check_delta(self.delta, self.units)

    @property
    def rate(self) -> float:
        """q, the sampling probability that is accounted for."""
        return min(1.0, self.batch / self.units) if self.amplified else 1.0

    @property
    def empty(self) -> float:
        """Probability that a step takes no unit at all; such a step is noise alone."""
        if not self.amplified or self.batch >= self.units:
            return 0.0
        return math.exp(self.units * math.log1p(-self.batch / self.units))

    def noise(self, budget: float) -> float:
        """The noise multiplier that a budget needs over all rounds; see `noise_for`."""
        return noise_for(budget, self.delta, self.rate, self.rounds * self.steps, self.figures)

    def events(self, noise: float, rounds: int | None = None) -> list[Event]:
        """What so many rounds release, by default all."""
        done = self.rounds if rounds is None else rounds
        figures = [replace(e, steps=math.ceil(e.steps * done / self.rounds)) for e in self.figures]
        return [Event(self.rate, noise, done * self.steps), *figures]


def record_schedule(job: Job, privacy: PrivacySection, records: int) -> Schedule:
    """What a job asks of a client with so many training examples.

    The expected batch of a step is training.batch_size * training.accumulation, and the budget
    is for all of `planned_rounds`.

    Raises:
        ConfigError: delta is too large for so few examples.
    """
    training = job.training
    rounds = privacy.planned_rounds or job.federation.rounds
    noisy = privacy.metrics == "noisy"
    return Schedule(
        unit="record",
        units=records,
        batch=float(min(records, training.batch_size * training.accumulation)),
        rounds=rounds,
        steps=training.local_steps,
        delta=privacy.delta if privacy.delta is not None else default_delta(records),
        figures=(Event(1.0, privacy.metrics_noise, rounds, "metric"),) if noisy else (),
    )


@dataclass(frozen=True)
class Row:
    """One budget.

    Attributes:
        budget: epsilon that may be spent.
        noise: noise multiplier sigma.
        rdp: epsilon after all rounds by the accountant that gates.
        prv: the same by the tighter one.
        per_coordinate: standard deviation of the noise on each coordinate of a step's mean, in
            units of the clip norm.
    """

    budget: float
    noise: float
    rdp: float
    prv: float
    per_coordinate: float


@dataclass(frozen=True)
class Plan:
    """What each of some budgets costs.

    Attributes:
        schedule: what is planned.
        rows: one per budget.
        batches: expected batches that are compared, the planned one among them.
        trade_off: budget -> noise per coordinate at each of `batches`, in units of the clip.
        spent: budget -> (round, epsilon by "rdp", epsilon by "prv") on the way.
    """

    schedule: Schedule
    rows: list[Row]
    batches: list[float]
    trade_off: dict[float, list[float]]
    spent: dict[float, list[tuple[int, float, float]]]


def make_plan(schedule: Schedule, budgets: Sequence[float], points: int = 6) -> Plan:
    """Noise, its size and the way to the budget, for each budget.

    Args:
        schedule: what is planned.
        budgets: epsilons.
        points: rounds at which epsilon is worked out on the way.

    Raises:
        BudgetExhausted: no noise fits, e.g. because of `figures`.
        ConfigError: delta, a rate or a budget out of its range.
    """
    scaled = {min(schedule.batch * scale, float(schedule.units)) for scale in SCALES}
    batches = sorted(scaled | {schedule.batch})
    # an expected batch of less than one unit is of no use
    batches = [batch for batch in batches if batch >= 1 or batch == schedule.batch]
    marks = sorted({max(1, round(schedule.rounds * k / points)) for k in range(1, points + 1)})
    rows, trade_off, spent = [], {}, {}
    for budget in budgets:
        noise = schedule.noise(budget)
        sizes = [
            (noise if batch == schedule.batch else replace(schedule, batch=batch).noise(budget))
            / batch
            for batch in batches
        ]
        way = [
            (
                mark,
                epsilon(schedule.events(noise, mark), schedule.delta),
                epsilon(schedule.events(noise, mark), schedule.delta, "prv"),
            )
            for mark in marks
        ]
        rows.append(Row(budget, noise, way[-1][1], way[-1][2], noise / schedule.batch))
        trade_off[budget], spent[budget] = sizes, way
    return Plan(schedule, rows, batches, trade_off, spent)


def noise_norm(row: Row, size: int) -> float:
    """Expected L2 norm of the noise on an update of so many numbers, in units of the clip."""
    return row.per_coordinate * math.sqrt(size)
