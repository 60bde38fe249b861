"""Logs: one line per message, for people or as JSON, with the run, round and client it is about.

Only the logger "fedlora" gets a handler: an application that imports fedlora as a library keeps
its own root logger as it was.
"""

import json
import logging
import math
import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any, TextIO

from fedlora.errors import ConfigError, near_miss

LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
# how a process that starts others tells them its choice
FORMAT_VARIABLE, LEVEL_VARIABLE = "FEDLORA_LOG_FORMAT", "FEDLORA_LOG_LEVEL"
FORMATS = ("text", "json")

MASK = "***"
MAX_TEXT = 8192
MAX_DEPTH = 6
MAX_ITEMS = 1000

_SECRETS = {"ticket", "key", "token", "secret", "password", "credential", "authorization"}
_WORDS = re.compile(r"[A-Z]?[a-z]+|[A-Z]+")
# what a record has before anybody adds fields to it
_PLAIN = {*vars(logging.makeLogRecord({})), "message", "asctime", "taskName"}
_HEAD = ("time", "level", "logger", "message")

_context: ContextVar[Mapping[str, object]] = ContextVar("fedlora_log_context")


class _Handler(logging.StreamHandler[TextIO]):
    """The handler that `configure` installs, told from those of others by its class."""


def configure(as_json: bool, level: str = "INFO", stream: TextIO | None = None) -> None:
    """Sends what fedlora logs to one stream; a second call replaces the first.

    Args:
        as_json: JSON lines for machines, or text for people.
        level: the lowest that is shown, e.g. "INFO".
        stream: by default standard error.

    Raises:
        ConfigError: no such level.
    """
    name = level.upper()
    if name not in LEVELS:
        raise ConfigError(
            f"log level {level!r} is not known{near_miss(name, LEVELS)}; choose one of: "
            f"{', '.join(LEVELS)}"
        )
    handler = _Handler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter() if as_json else TextFormatter())
    log = logging.getLogger("fedlora")
    for old in [h for h in log.handlers if isinstance(h, _Handler)]:
        log.removeHandler(old)
    log.addHandler(handler)
    log.setLevel(name)
    log.propagate = False


def environment(as_json: bool, level: str = "INFO") -> dict[str, str]:
    """Variables with which child processes log alike; see `configure_from_environment`."""
    return {FORMAT_VARIABLE: FORMATS[as_json], LEVEL_VARIABLE: level}


def configure_from_environment(stream: TextIO | None = None) -> None:
    """`configure` as the process that started this one says, otherwise text from INFO up.

    Raises:
        ConfigError: no such format or level.
    """
    chosen = os.environ.get(FORMAT_VARIABLE, FORMATS[0])
    if chosen not in FORMATS:
        raise ConfigError(
            f"{FORMAT_VARIABLE} = {chosen!r} is not known; choose one of: {', '.join(FORMATS)}"
        )
    configure(chosen == "json", os.environ.get(LEVEL_VARIABLE, "INFO"), stream)


@contextmanager
def log_context(**fields: object) -> Iterator[None]:
    """Inside, every message carries these fields, besides those of the contexts around it.

    A new thread begins without a context; `contextvars.copy_context().run` takes one along.
    """
    token = _context.set({**_context.get({}), **fields})
    try:
        yield
    finally:
        _context.reset(token)


def fields_of(record: logging.LogRecord) -> dict[str, Any]:
    """Context and extra fields of a record, fit for JSON, secrets masked; never raises."""
    # what begins with an underscore was left there by a library (Ray does)
    extra = {
        key: value
        for key, value in vars(record).items()
        if key not in _PLAIN and not key.startswith("_")
    }
    both = {**_context.get({}), **extra}
    return {
        f"{key}_" if key in _HEAD else str(key): _masked(str(key), value, 0)
        for key, value in both.items()
    }


class JsonFormatter(logging.Formatter):
    """One JSON object per line: time, level, logger, message, then the fields."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, without its end; never raises."""
        line = {
            "time": _time(record),
            "level": record.levelname,
            "logger": record.name,
            "message": _message(record),
            **fields_of(record),
        }
        if record.exc_info:
            line["exception"] = _cut(self.formatException(record.exc_info))
        return json.dumps(line, allow_nan=False)


class TextFormatter(logging.Formatter):
    """Time, level, logger and message, then the fields as key=value.

    What a peer sent cannot forge a line or move the cursor: further lines of a message are
    indented, and characters that do not print are escaped.
    """

    def format(self, record: logging.LogRecord) -> str:
        """The line, without its end; never raises."""
        name = record.name.removeprefix("fedlora.")
        pairs = [f"{k}={_short(v)}" for k, v in fields_of(record).items() if v is not None]
        tail = f"  [{' '.join(pairs)}]" if pairs else ""
        text = f"{_time(record)} {record.levelname:<7} {name}: {_message(record)}{tail}"
        if record.exc_info:
            text += "\n" + _cut(self.formatException(record.exc_info))
        return "\n    ".join(_printable(line) for line in text.split("\n"))


def _time(record: logging.LogRecord) -> str:
    moment = datetime.fromtimestamp(record.created, UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _message(record: logging.LogRecord) -> str:
    try:
        return _cut(record.getMessage())
    except Exception:  # arguments may fail in any way they like
        return _cut(f"{_repr(record.msg)} {_repr(record.args)}")


def _masked(key: str, value: object, depth: int) -> Any:
    words = {word.lower().removesuffix("s") for word in _WORDS.findall(key)}
    # a count of tokens is no secret
    if words & _SECRETS and not isinstance(value, bool | int | float | None):
        return MASK
    try:
        return _plain(value, depth)
    except Exception:  # a foreign container may fail in any way it likes
        return f"<{type(value).__name__} that cannot be read>"


def _plain(value: object, depth: int) -> Any:
    """A value as JSON has it, or else its repr."""
    if value is None or isinstance(value, bool):
        return value
    # exact types: a subclass may do what it likes when it is written
    if type(value) is int:
        return value if abs(value) < 1 << 63 else _repr(value)
    if type(value) is float:
        return value if math.isfinite(value) else repr(value)
    if type(value) is str:
        return _cut(value)
    if not isinstance(value, Mapping | list | tuple | set | frozenset):
        return _repr(value)
    # no repr of a container: it would show what is masked
    if depth >= MAX_DEPTH or len(value) > MAX_ITEMS:
        return f"<{type(value).__name__} of {len(value)}>"
    if isinstance(value, Mapping):
        return {_name(k): _masked(_name(k), v, depth + 1) for k, v in value.items()}
    return [_plain(item, depth + 1) for item in value]


def _name(key: object) -> str:
    return _cut(key) if type(key) is str else _repr(key)


def _repr(value: object) -> str:
    try:
        return _cut(repr(value))
    except Exception:  # a foreign object may fail in any way it likes
        return f"<{type(value).__name__} without a repr>"


def _cut(text: str) -> str:
    return text if len(text) <= MAX_TEXT else text[:MAX_TEXT] + "..."


def _short(value: Any) -> str:
    if isinstance(value, str) and value and not any(c.isspace() or c in '"=]' for c in value):
        return value
    return json.dumps(value, ensure_ascii=False)


def _printable(line: str) -> str:
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode()
        for c in line
    )
