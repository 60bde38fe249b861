"""Reads a job.toml, applies overrides and reports every problem at once."""

import tomllib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import tomli_w
from pydantic import BaseModel, ValidationError

from fedlora.config.job import Job
from fedlora.config.section import Section
from fedlora.errors import ConfigError, near_miss

Table = TypeVar("Table", bound=Section)


def load_job(
    path: Path | None,
    overrides: Sequence[str] = (),
    known: Mapping[str, Collection[str]] | None = None,
) -> Job:
    """The job in `path` (or the default job) with `overrides` applied.

    Args:
        path: a TOML file; None is the default job.
        overrides: `section.key=value`, the value in TOML or a bare string.
        known: dotted key -> names it may take; a name with ":" is a plug-in and is let through.

    Raises:
        ConfigError: all problems together.
    """
    tree = read_toml(path, "job file", "fedlora init") if path else {}
    return parse_job(tree, overrides, known)


def parse_job(
    tree: dict[str, Any],
    overrides: Sequence[str] = (),
    known: Mapping[str, Collection[str]] | None = None,
) -> Job:
    """The job in a tree of plain values; see `load_job`."""
    problems: list[str] = []
    for override in overrides:
        problems += _apply(tree, override)
    problems += _unwritable(tree)
    for key, names in (known or {}).items():
        problems += _unknown_name(tree, key, names)
    return _validated(Job, tree, problems)


def parse_job_text(text: str) -> Job:
    """The job in TOML text, as a peer sends it.

    Raises:
        ConfigError: no TOML, or all problems of the job together.
    """
    try:
        tree = tomllib.loads(text)
    except tomllib.TOMLDecodeError as e:
        raise ConfigError(f"the job is not valid TOML: {e}") from e
    return parse_job(tree)


def dump_job(job: Job) -> str:
    """The resolved job as TOML; `load_job` of it gives an equal job."""
    return tomli_w.dumps(job.model_dump(mode="json", exclude_none=True), multiline_strings=False)


def parse_table(kind: type[Table], tree: dict[str, Any]) -> Table:
    """A tree of plain values as a section of this kind.

    Raises:
        ConfigError: all problems together.
    """
    return _validated(kind, tree, _unwritable(tree))


def read_toml(path: Path, what: str, command: str) -> dict[str, Any]:
    """The tree in a TOML file.

    Args:
        what: what the file is, for the message.
        command: what writes such a file.

    Raises:
        ConfigError: missing, unreadable or not TOML.
    """
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise ConfigError(
            f"{what} {path} does not exist; write one with: {command} {path}"
        ) from None
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"{what} {path} cannot be read: {e}") from e
    except tomllib.TOMLDecodeError as e:
        raise ConfigError(f"{what} {path} is not valid TOML: {e}") from e


def _validated(kind: type[Table], tree: dict[str, Any], problems: list[str]) -> Table:
    """The tree as a section, unless there are `problems` already or it has more."""
    try:
        value = kind.model_validate(tree)
    except ValidationError as e:
        for error in e.errors():
            problems += _explain(error, kind)
    if problems:
        raise ConfigError(*problems)
    return value


def _apply(tree: dict[str, Any], override: str) -> list[str]:
    key, equals, text = override.partition("=")
    if not equals or not all(key.split(".")):
        return [f"override {override!r} is not of the form section.key=value"]
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    *parents, last = key.strip().split(".")
    node: Any = tree
    for name in parents:
        node = node.setdefault(name, {})
        if not isinstance(node, dict):
            return [f"override {override!r}: {name} is a value, not a table"]
    node[last] = value
    return []


def _unwritable(value: Any, key: str = "") -> list[str]:
    """Texts that no path, column or record can hold: with a NUL, or no Unicode."""
    if isinstance(value, dict):
        parts = [(text, key) for text in value]
        parts += [(inner, f"{key}.{name}".lstrip(".")) for name, inner in value.items()]
    elif isinstance(value, list):
        parts = [(inner, key) for inner in value]
    elif isinstance(value, str) and ("\0" in value or not _is_unicode(value)):
        return [f"{key} has a NUL or no valid UTF-8 in {value[:60]!r}; remove those characters"]
    else:
        return []
    return [problem for inner, name in parts for problem in _unwritable(inner, name)]


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _unknown_name(tree: dict[str, Any], key: str, names: Collection[str]) -> list[str]:
    section, field = key.split(".")
    table = tree.get(section)
    name = table.get(field) if isinstance(table, dict) else None
    if not isinstance(name, str) or name in names or (key == "federation.strategy" and ":" in name):
        return []
    return [f'{key} = "{name}" is not known{near_miss(name, names)}; known: {", ".join(names)}']


def _explain(error: Any, root: type[BaseModel]) -> list[str]:
    location = [
        str(part) for part in error["loc"] if part not in ("list[str]", "list[constrained-int]")
    ]
    key = ".".join(part for part in location if not part.startswith("literal["))
    kind, found = error["type"], error["input"]
    if kind == "extra_forbidden":
        fields = list(_section(root, location[:-1]).model_fields)
        return [
            f"{key} is not a known key{near_miss(location[-1], fields)}; known: {', '.join(fields)}"
        ]
    if kind == "literal_error":
        expected = error["ctx"]["expected"]
        names = expected.replace("'", "").replace(" or ", ", ").split(", ")
        hint = near_miss(str(found), names)
        return [f"{key} = {found!r} is not known{hint}; known: {', '.join(names)}"]
    if kind == "value_error":
        return str(error["ctx"]["error"]).split("\n")
    return [f"{key} = {found!r}: {error['msg'][0].lower()}{error['msg'][1:]}"]


def _section(root: type[BaseModel], location: Sequence[str]) -> type[BaseModel]:
    section = root
    for part in location:
        if part in section.model_fields:
            annotation: Any = section.model_fields[part].annotation
            inner = getattr(annotation, "__args__", (annotation,))[0]
            section = inner if isinstance(inner, type) and issubclass(inner, BaseModel) else section
    return section
