"""Errors of a strategy, told so that its author finds them; the run stands where it stood."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor

from fedlora.adapter import Tensors
from fedlora.errors import FedloraError, StrategyError
from fedlora.messages import ClientUpdate
from fedlora.strategies.base import Strategy, StrategyState

# what is watched, as it is told in a message, and its tensors by name
Watched = Mapping[str, Tensors]


@dataclass
class Step:
    """Name of the function of the strategy that is being called."""

    name: str


@contextmanager
def strategy_errors(
    strategy: Strategy, state: StrategyState, step: str, watched: Watched | None = None
) -> Iterator[Step]:
    """Inside, whatever goes wrong is a StrategyError that names strategy, round and step.

    Yields the step, whose name may be changed as the next function is called.

    Args:
        state: what the strategy is given; changing it in place is an error.
        step: name of the function that is called.
        watched: further tensors that it must leave as they are.

    Raises:
        StrategyError: the strategy raised, or changed a tensor that it was given.
    """
    number, at = state.round + 1, Step(step)
    held = {"the state": state.tensors, **(watched or {})}
    before = _versions(held)
    try:
        yield at
        after = _versions(held)
        # in the order of `held`: a change of what is shared is told of the state
        if changed := [k for k in before | after if before.get(k) != after.get(k)]:
            place, name = changed[0]
            raise StrategyError(
                f"{at.name} changed tensor {name} of {place} it was given; a strategy must "
                "return new tensors"
            )
    except FedloraError as e:
        if isinstance(e, StrategyError):
            raise StrategyError(
                f"strategy {strategy.name!r}, round {number}: {e}; the run stands at round "
                f"{state.round}"
            ) from e
        raise
    except (Exception, SystemExit) as e:  # a plug-in may fail in any way it likes
        raise StrategyError(
            f"strategy {strategy.name!r} failed in {at.name} of round {number}: "
            f"{type(e).__name__}: {e}; the run stands at round {state.round}"
        ) from e


def starts(updates: Iterable[ClientUpdate]) -> Watched:
    """The starts of updates; clients of one rank share theirs, which is watched once."""
    distinct: dict[int, ClientUpdate] = {}
    for update in updates:
        distinct.setdefault(id(update.begin.tensors), update)
    return {f"the start of client {u.client}": u.begin.tensors for u in distinct.values()}


def expect_type(value: object, kind: type, what: str) -> None:
    """Raises StrategyError unless `value`, which is told as `what`, is a `kind`."""
    if not isinstance(value, kind):
        raise StrategyError(f"{what} is a {type(value).__name__}; expected a {kind.__name__}")


def _versions(held: Watched) -> dict[tuple[str, str], tuple[int, int]]:
    # torch counts every change of a tensor in place
    return {
        (place, name): (id(t), t._version)
        for place, tensors in held.items()
        for name, t in tensors.items()
        if isinstance(t, Tensor)
    }
