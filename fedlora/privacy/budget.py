"""Budgets of privacy, and whether one covers something."""

from collections.abc import Sequence
from dataclasses import dataclass

from fedlora.errors import BudgetExhausted
from fedlora.privacy.accounting import Event, epsilon


@dataclass(frozen=True)
class Budget:
    """What may be spent in all.

    Attributes:
        epsilon: largest epsilon; None for no limit.
        delta: at which it is measured.
    """

    epsilon: float | None
    delta: float

    def after(
        self, spent: Sequence[Event], events: Sequence[Event], whose: str, what: str
    ) -> float:
        """Epsilon once `events` are added to what is spent, by Renyi accounting.

        Args:
            spent: so far.
            events: what is asked for.
            whose: names the budget in the error, e.g. "run".
            what: names the events in the error.

        Raises:
            BudgetExhausted: it would be more than `epsilon`.
        """
        asked = epsilon([*spent, *events], self.delta)
        if self.epsilon is not None and asked > self.epsilon:
            before = epsilon(spent, self.delta)
            raise BudgetExhausted(
                f"privacy budget of the {whose} is epsilon {self.epsilon:g} at delta "
                f"{self.delta:g}; {before:.4g} is spent, and {what} would make it {asked:.4g}; "
                "nothing was trained for it: raise the budget, or keep what was released so far",
                budget=self.epsilon,
                spent=before,
                asked=asked,
            )
        return asked
