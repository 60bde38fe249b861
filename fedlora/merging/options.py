"""A merger by its name, with the options that a user gave."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from fedlora.errors import ConfigError, near_miss
from fedlora.merging import MERGERS, Merger


def make_merger(name: str, options: Mapping[str, Any]) -> Merger:
    """The merger called `name`.

    Raises:
        ConfigError: an unknown name or option, or a value of another type or out of range.
    """
    if name not in MERGERS:
        raise ConfigError(
            f"--strategy {name!r} is not known{near_miss(name, MERGERS)}; "
            f"known: {', '.join(MERGERS)}"
        )
    known = {field.name: field.default for field in dataclasses.fields(MERGERS[name])}
    checked = {}
    for key, value in options.items():
        if key not in known:
            raise ConfigError(
                f"option {key!r} is not known to {name}{near_miss(key, known)}; "
                f"known: {', '.join(known) or 'none'}"
            )
        default = known[key]
        if isinstance(default, float) and type(value) is int:
            value = float(value)
        if type(value) is not type(default):
            raise ConfigError(
                f"option {key} = {value!r} is a {type(value).__name__}; "
                f"expected a {type(default).__name__}"
            )
        checked[key] = value
    return MERGERS[name](**checked)
