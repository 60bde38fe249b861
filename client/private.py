"""SitePrivacy: what one client does so that what it sends is private to each of its examples.

The order matters. The charge is written to the ledger before a single example is read; the
update is on disk before it is charged as spent; and only then may it leave. An update that was
made once is sent again as it is, and never made anew: other noise would be another release.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path

from fedlora.config.job import Job
from fedlora.config.privacy import PrivacySection
from fedlora.data.federated import ClientData
from fedlora.messages import PrivacyStatement, RoundPlan
from fedlora.privacy.accounting import Event, epsilon, merged
from fedlora.privacy.dataset import dataset_id, site_key
from fedlora.privacy.ledger import Budget, Ledger, Release
from fedlora.privacy.mechanism import Mechanism
from fedlora.privacy.noise import NoiseSource, noise_source
from fedlora.privacy.plan import Schedule, record_schedule
from fedlora.privacy.sampling import secret_uniform, seeded_uniform


@dataclass(frozen=True)
class Terms:
    """What a job asks of the privacy of a client with n examples.

    Attributes:
        rate: q, the probability of an example to be in a step's batch.
        noise_multiplier: sigma.
        delta: of the run.
    """

    rate: float
    noise_multiplier: float
    delta: float


def terms(job: Job, privacy: PrivacySection, examples: int) -> Terms:
    """The sampling rate, noise and delta for a client with so many examples.

    Raises:
        ConfigError: delta is too large for the client's data, or no noise fits the budget.
    """
    schedule = record_schedule(job, privacy, examples)
    noise = privacy.noise_multiplier
    if noise is None:
        assert privacy.epsilon is not None, "the section has one of the two"
        # a run that trains nothing needs no noise, but has to name some
        noise = _noise(replace(schedule, steps=max(1, schedule.steps)), privacy.epsilon)
    return Terms(schedule.rate, noise, schedule.delta)


# the clients of a simulation have much in common, and both take a while
@lru_cache(maxsize=1024)
def _noise(schedule: Schedule, budget: float) -> float:
    return schedule.noise(budget)


@lru_cache(maxsize=1024)
def _spent(events: tuple[Event, ...], delta: float) -> float:
    return epsilon(events, delta, "prv")


class SitePrivacy:
    """One client's side of `[privacy]` with unit = "record".

    Args:
        job: the run's job; has a [privacy] table.
        data: the client's examples.
        folder: where the site keeps its ledgers.
        site: most that all runs together may spend on these data; None for no limit beyond
            that of each run.
    """

    def __init__(
        self,
        job: Job,
        data: ClientData,
        folder: Path,
        *,
        site: Budget | None = None,
    ) -> None:
        assert job.privacy is not None, "without a [privacy] table there is nothing to keep"
        self.job = job
        self.section = job.privacy
        self.data = data
        self.folder = folder
        self.site = site

    @cached_property
    def terms(self) -> Terms:
        """See `terms`."""
        return terms(self.job, self.section, len(self.data.train))

    @contextmanager
    def ledger(self) -> Iterator[Ledger]:
        """The ledger of the client's data set, locked against other processes of the site.

        Raises:
            LedgerError: it is missing, damaged, rolled back, or of other data.
        """
        key = dataset_id(site_key(self.folder), self.data.records)
        with Ledger.open(
            self.folder,
            key,
            unit="record",
            epsilon=self.section.epsilon,
            delta=self.terms.delta,
            site=self.site,
        ) as ledger:
            yield ledger

    def events(self, steps: int) -> list[Event]:
        """What a round of so many private steps costs."""
        events = [Event(self.terms.rate, self.terms.noise_multiplier, steps)]
        if self.section.metrics == "noisy" and self.data.validation:
            events.append(Event(1.0, self.section.metrics_noise, 1, "metric"))
        return events

    def source(self, plan: RoundPlan, what: str) -> NoiseSource:
        """Of the noise in one round; each `what` has its own."""
        names = (what, self.data.name, plan.round, plan.attempt)
        return noise_source(self.section.noise, self.job.run.seed, *names)

    def mechanism(self, plan: RoundPlan) -> Mechanism:
        """Clips, noises and samples for one round."""
        names = (self.data.name, plan.round, plan.attempt)
        seed = self.job.run.seed
        test = self.section.noise == "test"
        return Mechanism(
            examples=len(self.data.train),
            rate=self.terms.rate,
            clip=self.section.max_grad_norm,
            noise_multiplier=self.terms.noise_multiplier,
            source=self.source(plan, "train"),
            uniform=seeded_uniform(seed, *names) if test else secret_uniform,
            per_sample=self.section.per_sample,
        )

    def statement(self, ledger: Ledger, run: str) -> PrivacyStatement:
        """What may be said to the server, by the ledger as it stands."""
        entry, head = ledger.head
        events = ledger.charged(run)
        private = self.section.noise != "test"
        return PrivacyStatement(
            unit="record",
            epsilon=_spent(tuple(merged(events)), self.terms.delta) if private else None,
            delta=self.terms.delta,
            noise_multiplier=self.terms.noise_multiplier,
            clip=self.section.max_grad_norm,
            steps=sum(event.steps for event in events if event.kind == "train"),
            accountant="prv",
            noise=self.section.noise,
            entry=entry,
            head=head,
        )


def release_of(plan: RoundPlan, start_sha256: str) -> Release:
    """Names the release of a round in the ledger."""
    return Release(plan.run, plan.round, plan.attempt, start_sha256)
