"""Law: one thing that must hold for a strategy, and how to tell a newcomer that it does not."""

from collections.abc import Callable
from dataclasses import dataclass

from fedlora.strategies.base import Strategy
from fedlora.strategies.conformance.federation import Federation


class LawBroken(AssertionError):
    """What was found, and what the law expects."""

    def __init__(self, found: str, expected: str) -> None:
        super().__init__(f"{found}; expected {expected}")
        self.found = found
        self.expected = expected


@dataclass(frozen=True)
class Law:
    """One law.

    Attributes:
        name: as in `Strategy.waives`.
        meaning: the law in one sentence.
        cause: the usual mistake when it is broken.
        look: where to look.
        run: raises `LawBroken`.
        applies: whether the law says anything about a strategy with this federation.
        waivable: a strategy may declare, with its reason, that it does not keep the law.
        gate: when it is broken, no other law can be tried.
    """

    name: str
    meaning: str
    cause: str
    look: str
    run: Callable[[Federation], None]
    applies: Callable[[Federation, Strategy], bool] = lambda federation, strategy: True
    waivable: bool = False
    gate: bool = False


def require(held: bool, found: str, expected: str) -> None:
    """Raises `LawBroken` unless `held`."""
    if not held:
        raise LawBroken(found, expected)
