"""What the laws of the mean share: rounds to look at, tolerances, and two comparisons."""

from collections.abc import Sequence

import torch

from fedlora.messages import ClientUpdate
from fedlora.strategies.base import Strategy, StrategyState
from fedlora.strategies.conformance.federation import Federation
from fedlora.strategies.conformance.law import require
from fedlora.strategies.conformance.reference import distance, effect, ended

# what two orders of a float64 sum may differ by after rounding to float32 once
SAME = 1e-7
# float32 factors: rounding of each times the number of terms of a product
EXACT = 1e-5
SUMS = 1e-10


Round = tuple[Strategy, StrategyState, list[ClientUpdate]]


def rounds(federation: Federation) -> list[Round]:
    """A new strategy, the state before each of the first rounds, and what clients send."""
    found = []
    for state in federation.walk():
        strategy = federation.strategy()
        found.append((strategy, state, federation.cohort(strategy, state)))
    return found


def taken(
    federation: Federation,
    strategy: Strategy,
    state: StrategyState,
    updates: Sequence[ClientUpdate],
    when: str,
) -> None:
    """The one adapter that all these updates end with is the next one."""
    wanted = ended(federation, strategy, state, updates[0])
    found = effect(federation, strategy, federation.round(strategy, state, updates))
    gap, name = distance(found, wanted)
    require(
        gap <= EXACT,
        f"{when}, {name} of the global adapter differs by {gap:.1e} (relative) from it",
        "what that client ended with",
    )


def finite(state: StrategyState, when: str) -> None:
    """No tensor of the state is NaN or infinite."""
    for name, tensor in state.tensors.items():
        sound = bool(torch.isfinite(tensor).all())
        require(sound, f"{when}, {name} is not finite", "finite numbers")
