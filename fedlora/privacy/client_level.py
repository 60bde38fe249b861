"""Terms of a run that is private to whole clients: who is enrolled, how much noise, why not."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fedlora.config.privacy import PrivacySection
from fedlora.errors import ConfigError
from fedlora.privacy.accounting import Accountant, Event, check_delta, default_delta, noise_for
from fedlora.privacy.central import AdaptiveClip, CentralGaussian, Shapes
from fedlora.privacy.noise import NoiseMode, NoiseSource, noise_source
from fedlora.privacy.scope import FEW_CLIENTS, NOT_COVERED
from fedlora.strategies.base import Conditions, Strategy
from fedlora.strategies.wrappers import Wrapper

Sampling = Literal["poisson", "fixed"]

# what is reported; the gate of the ledger is the looser "rdp"
ACCOUNTANT: Accountant = "prv"


@dataclass(frozen=True)
class Terms:
    """What is promised to every client, and by which means.

    Attributes:
        population: N, enrolled clients; fixed.
        per_round: C, clients expected in a round.
        rounds: T, of the whole run.
        sampling: poisson: each client takes part with probability C / N, on its own. fixed: C
            clients are drawn, which amplifies nothing.
        noise_multiplier: z, accounted for in each round.
        clip: S, of the first round.
        adaptive: S follows the median norm.
        epsilon: budget; None without.
        delta: of the budget.
        noise: where noise comes from.
        solved: z was chosen so that all rounds fit into the budget.
    """

    population: int
    per_round: int
    rounds: int
    sampling: Sampling
    noise_multiplier: float
    clip: float
    adaptive: bool
    epsilon: float | None
    delta: float
    noise: NoiseMode
    solved: bool

    @property
    def rate(self) -> float:
        """Probability that is accounted for: that a client takes part in a round, or 1."""
        return self.per_round / self.population if self.sampling == "poisson" else 1.0

    @property
    def private(self) -> bool:
        """Noise comes from a source that nobody can repeat."""
        return self.noise != "test"

    @property
    def adjacency(self) -> str:
        """Which pairs of federations cannot be told apart."""
        if self.sampling == "poisson":
            return "add or remove all data of one client"
        return (
            "all data of one enrolled client, or none in its place (exchanging one client for "
            "another counts twice: the sensitivity is 2 S)"
        )

    def event(self, noise_multiplier: float | None = None) -> Event:
        """What one round spends."""
        return Event(self.rate, noise_multiplier or self.noise_multiplier, 1)

    def source(self, seed: int) -> Callable[[int], NoiseSource]:
        """Round -> where its noise comes from; only test noise follows `run.seed`."""
        return lambda number: noise_source(self.noise, seed, "central", number)

    def mechanism(
        self, source: Callable[[int], NoiseSource], noise_multiplier: float | None = None
    ) -> CentralGaussian:
        """The mechanism of a round.

        Args:
            source: round -> where its noise comes from.
            noise_multiplier: z, by default that of the terms.
        """
        return CentralGaussian(
            noise_multiplier or self.noise_multiplier,
            float(self.per_round),
            source,
            AdaptiveClip() if self.adaptive else None,
        )

    def summary(self) -> dict[str, Any]:
        """The terms for the record of a run, with what they do not cover."""
        return {
            "unit": "client",
            "adjacency": self.adjacency,
            "trusted": "the server",
            "delta": self.delta,
            "accountant": ACCOUNTANT,
            "population": self.population,
            "clients_per_round": self.per_round,
            "sampling": self.sampling,
            "adaptive_clip": self.adaptive,
            "noise": self.noise,
            "private": self.private,
            "not_covered": list(NOT_COVERED["client"]),
        }

    def warning(self, sent: Shapes) -> str:
        """What a run with few clients must expect, in figures; empty with enough clients.

        Args:
            sent: name and shape of every tensor that one client sends.
        """
        if self.population >= FEW_CLIENTS:
            return ""
        num_sent = sum(math.prod(shape) for shape in sent.values())
        std = self.mechanism(_no_source).sum_multiplier / self.per_round
        return (
            f'privacy.unit = "client" with {self.population} clients: noise of {std:.3g} x clip '
            f"on each entry of the mean update, {std * math.sqrt(num_sent):.3g} x clip over all "
            f"{num_sent:,} of them, where the longest mean update is 1 x clip. With fewer than "
            f'{FEW_CLIENTS} clients choose privacy.unit = "record", more clients per round, or '
            "an adapter of fewer numbers (ffa-lora, lora-xs)"
        )


def make_terms(
    section: PrivacySection, population: int, clients_per_round: int | None, rounds: int
) -> Terms:
    """The terms of a job.

    Args:
        section: the job's, with unit = "client".
        population: enrolled clients.
        clients_per_round: expected in a round; None for all.
        rounds: of the whole run.

    Raises:
        ConfigError: what does not go together.
        BudgetExhausted: no noise is large enough for the budget.
    """
    per_round = clients_per_round or population
    if per_round > population:
        raise ConfigError(
            f"federation.clients_per_round = {per_round} is more than the {population} enrolled "
            "clients (privacy.population); choose at most that"
        )
    if section.metrics != "none":
        raise ConfigError(
            f'privacy.metrics = "{section.metrics}" is not offered with privacy.unit = "client", '
            'where what clients say of their loss is not kept at all; set it to "none", and '
            "measure on data.test"
        )
    delta = section.delta if section.delta is not None else default_delta(population)
    check_delta(delta, population)
    rate = per_round / population if section.client_sampling == "poisson" else 1.0
    noise_multiplier = section.noise_multiplier
    if noise_multiplier is None:
        assert section.epsilon is not None, "the section has one of the two"
        noise_multiplier = noise_for(section.epsilon, delta, rate, rounds)
    return Terms(
        population=population,
        per_round=per_round,
        rounds=rounds,
        sampling=section.client_sampling,
        noise_multiplier=noise_multiplier,
        clip=section.clip_norm,
        adaptive=section.adaptive_clip,
        epsilon=section.epsilon,
        delta=delta,
        noise=section.noise,
        solved=section.noise_multiplier is None,
    )


def check_client_level(strategy: Strategy, given: Conditions) -> None:
    """Refuses, before round 1, what would void the guarantee or make nonsense of it.

    Raises:
        ConfigError: with the reason and what to choose instead.
    """
    if given.asynchronous:
        raise ConfigError(
            'federation.mode = "async" does not go with privacy.unit = "client": fast clients '
            "take part more often than their sampling probability, which nothing here accounts "
            'for; set it to "sync"'
        )
    ranks = sorted({*given.ranks, given.spec.rank})
    if len(ranks) > 1:
        raise ConfigError(
            'privacy.unit = "client" adds the updates of all clients up before the strategy sees '
            f"them, so that all must hold the same adapter; clients have ranks {ranks}; give all "
            f"rank {given.spec.rank}"
        )
    for wrapper in _wrappers(strategy):
        if type(wrapper).screen is not Wrapper.screen:
            raise ConfigError(
                f"wrapper {wrapper.name!r} looks at updates one by one, but with privacy.unit = "
                '"client" only their noisy mean leaves the mechanism (which clips every update '
                "itself, to privacy.clip_norm); leave it out of federation.wrappers"
            )


def _wrappers(strategy: Strategy) -> Sequence[Wrapper]:
    if not isinstance(strategy, Wrapper):
        return []
    return [s for s in (strategy, *strategy.inside()) if isinstance(s, Wrapper)]


def _no_source(number: int) -> NoiseSource:
    raise AssertionError("nothing is released to make a forecast")
