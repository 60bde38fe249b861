"""What is remembered by factor means something only while factors keep their meaning."""

from fedlora.errors import ConfigError, StrategyError
from fedlora.strategies.base import StrategyState
from fedlora.strategies.fold import folds
from fedlora.strategies.wrappers.base import Wrapper


def refuse_new_gauge(wrapper: Wrapper, what: str) -> None:
    """Refuses strategies that make factors anew, or leave some at the clients.

    Args:
        what: what the wrapper remembers, for the message.

    Raises:
        ConfigError: with the reason and what to choose instead.
    """
    *_, core = wrapper.inside()
    instead = "choose fedit, ffa-lora or rolora, or leave the wrapper out"
    if wrapper.regauges:
        raise ConfigError(
            f"wrapper {wrapper.name!r} does not fit strategy {core.name!r}, which makes the "
            f"factors anew between rounds, so that {what} of the old ones mean nothing; {instead}"
        )
    if wrapper.personal:
        raise ConfigError(
            f"wrapper {wrapper.name!r} does not fit strategy {core.name!r}, of whose factors a "
            f"part stays at the clients, so that {what} would cover only the rest; {instead}"
        )


def refuse_fold(wrapper: Wrapper, old: StrategyState, new: StrategyState) -> None:
    """Refuses a strategy that moved a part of its merge into the base.

    Raises:
        StrategyError: the folds of the two states differ.
    """
    if folds(old.tensors).keys() != folds(new.tensors).keys():
        *_, core = wrapper.inside()
        raise StrategyError(
            f"wrapper {wrapper.name!r} does not fit strategy {core.name!r}, which folds a part of "
            "every round into the base: what the wrapper does to the factors would miss it; "
            "choose fedit, ffa-lora or rolora"
        )
