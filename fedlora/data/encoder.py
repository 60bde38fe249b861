"""Encoder: how the rows of one format become examples."""

from collections.abc import Sequence
from typing import Any, Protocol

from fedlora.data.example import Example
from fedlora.data.files import json_kind
from fedlora.data.rows import Row, value_of
from fedlora.data.unusable import Unusable
from fedlora.errors import DataError


class Encoder(Protocol):
    """Rows of one format to examples."""

    @property
    def packs(self) -> bool:
        """Whether examples join rows; else each usable row is one example, in order."""

    def check(self, row: Row) -> None:
        """Look at a row without encoding it.

        Raises:
            DataError: it is malformed; names file and line.
        """

    def encode(self, rows: Sequence[Row]) -> tuple[list[Example], Unusable]:
        """The examples of rows that passed `check`, and which rows gave none or were cut."""


def encode_first(
    encoder: Encoder, rows: Sequence[Row], limit: int | None
) -> tuple[list[Example], Unusable]:
    """The first `limit` examples (all when None); rows beyond them are not looked at."""
    if limit is None or encoder.packs:
        examples, unusable = encoder.encode(rows)
        return examples[:limit], unusable
    examples, parts = [], []
    while rows and len(examples) < limit:
        wanted = limit - len(examples)
        more, part = encoder.encode(rows[:wanted])
        examples += more
        parts.append(part)
        rows = rows[wanted:]
    return examples, Unusable.merge(parts)


def text_of(row: Row, column: str) -> str:
    """The text in a column; "" for null.

    Raises:
        DataError: the row lacks the column or has something else there; names file and line.
    """
    value = value_of(row, column)
    if value is None:
        return ""
    check_text(row, column, value)
    return str(value)


def check_text(row: Row, column: str, value: Any) -> None:
    """Check that a value is text.

    Raises:
        DataError: it is no string, or has half a surrogate pair, which no encoding can write.
    """
    if not isinstance(value, str):
        raise malformed(row, column, value, "a string")
    try:
        value.encode()
    except UnicodeEncodeError as e:
        raise DataError(
            f'{row.origin}: column "{column}" has half a surrogate pair at character '
            f"{e.start + 1}; expected Unicode text; correct the row"
        ) from e


def malformed(row: Row, column: str, found: Any, expected: str) -> DataError:
    """The error for a value of the wrong type."""
    return DataError(
        f'{row.origin}: column "{column}" is {json_kind(found)}; expected {expected}; '
        "correct the row, or name another column in the job"
    )
