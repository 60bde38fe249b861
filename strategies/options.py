"""Options of strategies and wrappers, checked against their defaults."""

from collections.abc import Mapping
from typing import Any

from fedlora.errors import ConfigError, near_miss


def checked_options(
    place: str, owner: str, given: Mapping[str, Any], known: Mapping[str, Any]
) -> dict[str, Any]:
    """`given` completed by the defaults in `known`.

    Args:
        place: dotted key of the options in the job.
        owner: who takes them, for the message.

    Raises:
        ConfigError: an unknown option, or a value of another type than its default.
    """
    for key, value in given.items():
        if key not in known:
            names = ", ".join(known) or "none"
            raise ConfigError(
                f"{place}.{key} is not known to {owner}{near_miss(key, known)}; known: {names}"
            )
        default = known[key]
        whole = isinstance(default, float) and type(value) is int
        if default is not None and type(value) is not type(default) and not whole:
            raise ConfigError(
                f"{place}.{key} = {value!r} is a {type(value).__name__}; expected a "
                f"{type(default).__name__}"
            )
    return {**known, **given}
