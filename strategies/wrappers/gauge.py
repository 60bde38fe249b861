"""What is remembered by factor means something only while factors keep their meaning."""

from fedlora.errors import ConfigError
from fedlora.strategies.wrappers.base import Wrapper


def refuse_new_gauge(wrapper: Wrapper, what: str) -> None:
    """Refuses strategies that make factors anew, fold into the base, or leave some at clients.

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
    if wrapper.folds:
        raise ConfigError(
            f"wrapper {wrapper.name!r} does not fit strategy {core.name!r}, which folds a part of "
            "every round into the base: what the wrapper does to the factors would miss it; "
            f"{instead}"
        )
    if wrapper.personal:
        raise ConfigError(
            f"wrapper {wrapper.name!r} does not fit strategy {core.name!r}, of whose factors a "
            f"part stays at the clients, so that {what} would cover only the rest; {instead}"
        )
