"""What noisy, Poisson-subsampled Gaussian steps spend: (epsilon, delta), add or remove one unit.

Two upper bounds on the same quantity. "rdp": Renyi differential privacy of the sampled Gaussian
mechanism, Mironov, Talwar and Zhang 2019, https://arxiv.org/abs/1908.10530, section 3.3, turned
into (epsilon, delta) by Balle et al. 2020, https://arxiv.org/abs/1905.09982, theorem 21. It
takes milliseconds and is what gates a release. "prv": numerical composition of privacy loss
variables, Gopi, Lee and Wutschitz 2021, https://arxiv.org/abs/2106.02848; within 0.01 of the
truth (less near it where 4 million points are too few), and what reports show beside it. Both
by Opacus. The central limit accountant ("gdp") is not offered: it may say less than was spent.

No credit is taken for a secret choice of clients, nor for steps that nobody sees.
"""

import math
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from fedlora.errors import BudgetExhausted, ConfigError

Accountant = Literal["rdp", "prv"]
ACCOUNTANTS: tuple[Accountant, ...] = ("rdp", "prv")

ORDERS: tuple[float, ...] = (
    *(1 + tenth / 10 for tenth in range(1, 100)),
    *range(11, 64),
    *(64, 80, 96, 128, 192, 256, 384, 512, 1024),
)
# beyond it the series for broken orders converges slowly, or never
_SERIES_RATE = 0.25
_PRV_ERROR = 0.01
# a finer grid takes gigabytes and minutes
_PRV_MAX_POINTS = 1 << 22
_LEAST_NOISE, _MOST_NOISE = 0.01, 1e6
_PER_DECADE = 9000  # numbers of 4 significant digits between two powers of ten


@dataclass(frozen=True)
class Event:
    """Some equal steps: each unit takes part with probability `rate`, then noise is added.

    Attributes:
        rate: Poisson sampling probability q in (0, 1].
        noise: sigma, standard deviation of the noise in units of the clip norm.
        steps: how many.
        kind: what they are for, e.g. "train" or "metric".

    Raises:
        ConfigError: a number that is not finite or out of its range.
    """

    rate: float
    noise: float
    steps: int
    kind: str = "train"

    def __post_init__(self) -> None:
        if not 0.0 < self.rate <= 1.0:
            raise ConfigError(f"sampling rate is {self.rate!r}; expected 0 < rate <= 1")
        if not (math.isfinite(self.noise) and self.noise > 0.0):
            raise ConfigError(
                f"noise multiplier is {self.noise!r}; expected a finite number above 0: without "
                "noise nothing is private"
            )
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 0:
            raise ConfigError(f"number of steps is {self.steps!r}; expected a whole number >= 0")


def epsilon(events: Iterable[Event], delta: float, accountant: Accountant = "rdp") -> float:
    """Upper bound on the epsilon that all events together spend; 0 for none.

    "prv" is never above "rdp", and equal to it where the numerical composition fails.

    Args:
        events: in any order.
        delta: in (0, 1).
        accountant: "rdp" or "prv".

    Raises:
        ConfigError: delta or accountant is none of these.
    """
    if not 0.0 < delta < 1.0:
        raise ConfigError(f"delta is {delta!r}; expected a number between 0 and 1")
    steps = merged(events)
    if accountant == "rdp":
        return _rdp_epsilon(steps, delta)
    if accountant == "prv":
        return _prv_epsilon(steps, delta)
    raise ConfigError(
        f"accountant {accountant!r} is not known; known: {', '.join(ACCOUNTANTS)} (a central "
        "limit is no upper bound)"
    )


def merged(events: Iterable[Event], *, kinds: bool = False) -> list[Event]:
    """One event for each rate and noise that occurs, in a canonical order, of kind "all".

    Args:
        events: in any order.
        kinds: keep events of different kinds apart.
    """
    total: Counter[tuple[float, float, str]] = Counter()
    for event in events:
        total[event.rate, event.noise, event.kind if kinds else "all"] += event.steps
    return [
        Event(rate, noise, steps, kind)
        for (rate, noise, kind), steps in sorted(total.items())
        if steps
    ]


def noise_for(
    budget_epsilon: float, delta: float, rate: float, steps: int, spent: Sequence[Event] = ()
) -> float:
    """Smallest noise multiplier with which `steps` more steps fit into a budget, by "rdp".

    Args:
        budget_epsilon: of everything, `spent` included.
        delta: of the budget.
        rate: sampling probability of the steps to come.
        steps: how many are to come; at least 1.
        spent: what was spent before.

    Returns:
        a number of 4 significant digits, rounded up; never below 0.01.

    Raises:
        BudgetExhausted: no noise is large enough.
        ConfigError: an argument is out of its range.
    """
    if not (math.isfinite(budget_epsilon) and budget_epsilon > 0.0):
        raise ConfigError(f"budget epsilon is {budget_epsilon!r}; expected a finite number above 0")
    if steps < 1:
        raise ConfigError(f"number of steps is {steps!r}; expected at least 1")

    def fits(place: int) -> bool:
        event = Event(rate, _round_number(place), steps)
        return epsilon([*spent, event], delta) <= budget_epsilon

    low, high = _place(_LEAST_NOISE), _place(_MOST_NOISE)
    if not fits(high):
        raise BudgetExhausted(
            f"no noise fits {steps} more steps into epsilon {budget_epsilon:g} at delta "
            f"{delta:g}: {epsilon(spent, delta):.4g} is spent; give the run a larger budget",
            budget=budget_epsilon,
            spent=epsilon(spent, delta),
            asked=math.inf,
        )
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle + 1, high)
    return _round_number(high)


def default_delta(num_units: int) -> float:
    """min(1e-5, 1 / (10 n)): well below the chance to pick one unit of n."""
    return min(1e-5, 1 / (10 * num_units))


def check_delta(delta: float, num_units: int) -> None:
    """Holds delta below 1 / n, where giving away one whole record would be allowed.

    Raises:
        ConfigError: it is not.
    """
    if not 0.0 < delta * num_units < 1.0:
        raise ConfigError(
            f"privacy.delta is {delta!r} with {num_units} units; expected above 0 and below "
            f"1 / {num_units} = {1 / num_units:.3g}; leave it out for "
            f"{default_delta(num_units):.3g}"
        )


def _place(number: float) -> int:
    """Place of a power of ten among the numbers of 4 significant digits."""
    return round(math.log10(number)) * _PER_DECADE


def _round_number(place: int) -> float:
    decade, digits = divmod(place, _PER_DECADE)
    return float(f"{1000 + digits}e{decade - 3}")


def _rdp_epsilon(events: Sequence[Event], delta: float) -> float:
    if not events:
        return 0.0

    def at(index: int) -> float:
        order = ORDERS[index]
        spent = math.fsum(e.steps * _divergence(e.rate, e.noise, order) for e in events)
        return spent + math.log1p(-1 / order) - (math.log(delta) + math.log(order)) / (order - 1)

    # chords have kinks, and cost little
    if any(_SERIES_RATE < event.rate < 1.0 for event in events):
        return max(0.0, min(at(index) for index in range(len(ORDERS))))
    # every order gives a bound; that of the best is found by halves, because a convex moment
    # and a constant over order - 1 fall, then rise
    low, high = 0, len(ORDERS) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if at(middle) <= at(middle + 1) else (middle + 1, high)
    return max(0.0, at(low))


@lru_cache(maxsize=1 << 16)
def _divergence(rate: float, noise: float, order: float) -> float:
    """Renyi divergence of one step at an order above 1; infinite where unknown."""
    gaussian = order / (2 * noise**2)
    if rate == 1.0:
        return gaussian
    if order == int(order) or rate <= _SERIES_RATE:
        moment = _log_moment(rate, noise, order)
    else:
        # the log moment is convex in the order, and 0 at 1: a chord lies above it
        below = math.floor(order)
        part = order - below
        start = below - 1 and (below - 1) * _divergence(rate, noise, below)
        moment = (1 - part) * start + part * below * _divergence(rate, noise, below + 1)
    # sampling only helps, and rounding must not pay anything back
    return min(max(moment / (order - 1), 0.0), gaussian)


def _log_moment(rate: float, noise: float, order: float) -> float:
    """(order - 1) times the divergence of one step; infinite where the series fails."""
    rdp = _opacus().analysis.rdp
    try:
        divergence = float(
            rdp.compute_rdp(q=rate, noise_multiplier=noise, steps=1, orders=float(order))
        )
    except (ArithmeticError, ValueError):  # the series lost its digits
        return math.inf
    return math.inf if math.isnan(divergence) else divergence * (order - 1)


def _prv_epsilon(events: Sequence[Event], delta: float) -> float:
    ceiling = _rdp_epsilon(events, delta)
    if not events:
        return ceiling
    accountant = _opacus().PRVAccountant()
    accountant.history = [(event.noise, event.rate, event.steps) for event in events]
    error = _PRV_ERROR * max(1.0, _prv_points(events, delta) / _PRV_MAX_POINTS)
    # Opacus vouches for its grid below 1 only
    if error > 0.5:
        return ceiling
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = float(accountant.get_epsilon(delta, eps_error=error))
    except (ArithmeticError, ValueError, RuntimeError, IndexError):  # outside of its grid
        return ceiling
    return min(found, ceiling) if math.isfinite(found) else ceiling


def _prv_points(events: Sequence[Event], delta: float) -> float:
    """Size of Opacus' grid at an error of 0.01: Gopi et al., remark 5.6."""
    steps = sum(event.steps for event in events)
    mesh = _PRV_ERROR / math.sqrt(steps * math.log(12 / (delta / 1000)) / 2)
    return 2 * (_rdp_epsilon(events, delta / 4000) + 3) / mesh


def _opacus() -> Any:
    # it imports torch, which reading a ledger does not need until something was spent
    from opacus import accountants

    return accountants
