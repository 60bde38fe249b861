"""The commented TOML files that `fedlora init` writes, made from the fields' own docs."""

import json
import textwrap
from types import NoneType
from typing import Any

import tomli_w
from pydantic import BaseModel

from fedlora.config.job import Hostile, Job

HEADING = """\
# A fedlora job: one file for the whole life of a run.
# Every value below is the default; a line that starts with "# key =" is an option that is off.
# Run it with:  fedlora simulate job.toml
"""


def render_tables(kind: type[BaseModel], heading: str) -> str:
    """TOML text with every table and field of `kind`, its documentation and its default."""
    parts = [heading]
    for name, field in kind.model_fields.items():
        section, optional = _section(field.annotation)
        off = "# " if optional else ""
        parts.append(f"\n# {(section.__doc__ or '').splitlines()[0]}\n{off}[{name}]")
        for key, option in section.model_fields.items():
            parts.append(_comment(option.description or ""))
            line = _assignment(key, option.default)
            parts.append(line if line.startswith("#") else f"{off}{line}")
    return "\n".join(parts) + "\n"


def _section(annotation: Any) -> tuple[type[BaseModel], bool]:
    """The kind of a table, and whether it may be missing."""
    kinds = [
        kind for kind in getattr(annotation, "__args__", (annotation,)) if kind is not NoneType
    ]
    section = kinds[0]
    assert isinstance(section, type)
    assert issubclass(section, BaseModel)
    return section, section is not annotation


def render_template() -> str:
    """The default job, and a table that may be repeated."""
    parts = [render_tables(Job, HEADING)]
    parts.append("# One group of clients that misbehave; the table may be repeated.")
    parts.append("# [[scenario.hostile]]")
    for key, option in Hostile.model_fields.items():
        parts.append(_comment(option.description or ""))
        default = "sign-flip" if option.is_required() else option.default
        parts.append(f"# {_assignment(key, default)}")
    return "\n".join(parts) + "\n"


def _comment(text: str) -> str:
    return textwrap.fill(" ".join(text.split()), 96, initial_indent="# ", subsequent_indent="# ")


def _assignment(key: str, value: Any) -> str:
    if value is None:
        return f"# {key} ="
    if value == {}:
        return f"# {key} = {{}}"
    if key == "hostile":
        return "# hostile: see the table at the end"
    if isinstance(value, list):
        # on one line; a list of texts is the same in JSON and TOML
        return f"{key} = {json.dumps(value)}"
    return tomli_w.dumps({key: value}).strip()
