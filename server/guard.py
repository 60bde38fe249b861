"""Errors of a strategy, told so that its author finds them; the run stands where it stood."""

from collections.abc import Iterator
from contextlib import contextmanager

from fedlora.errors import FedloraError, StrategyError
from fedlora.strategies.base import Strategy, StrategyState


@contextmanager
def strategy_errors(strategy: Strategy, state: StrategyState, step: str) -> Iterator[None]:
    """Inside, whatever goes wrong is a StrategyError that names strategy, round and step.

    Args:
        state: what the strategy is given; changing it in place is an error.
        step: name of the function that is called.

    Raises:
        StrategyError: the strategy raised, or changed a tensor of the state.
    """
    number = state.round + 1
    # torch counts every change of a tensor in place
    before = {name: (id(t), t._version) for name, t in state.tensors.items()}
    try:
        yield
        after = {name: (id(t), t._version) for name, t in state.tensors.items()}
        if changed := sorted({k for k, _ in before.items() ^ after.items()}):
            raise StrategyError(
                f"{step} changed tensor {changed[0]} of the state it was given; a strategy "
                "must return new tensors"
            )
    except FedloraError as e:
        if isinstance(e, StrategyError):
            raise StrategyError(
                f"strategy {strategy.name!r}, round {number}: {e}; the run stands at round "
                f"{state.round}"
            ) from e
        raise
    except Exception as e:  # a plug-in may fail in any way it likes
        raise StrategyError(
            f"strategy {strategy.name!r} failed in {step} of round {number}: "
            f"{type(e).__name__}: {e}; the run stands at round {state.round}"
        ) from e
