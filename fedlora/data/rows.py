"""Row and Table: raw data that remembers where it was written."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedlora.errors import DataError, near_miss


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a source.

    Attributes:
        values: column to value.
        origin: where it was written: file and line ("train.jsonl:17"), or row number counted
            from 1 where the format has no lines.
        folder: where relative picture paths in the row start; None where there is no folder.
        client: the client that the row belongs to, where the source says so; else None.
    """

    values: Mapping[str, Any]
    origin: str
    folder: Path | None = None
    client: str | None = None

    def digest(self) -> bytes:
        """SHA-256 of what the row says, (32,); the same wherever it was written."""
        found = hashlib.sha256()
        for column in sorted(self.values):
            value = _written(self.values[column])
            found.update(b"%d %b %d %b " % (len(column), column.encode(), len(value), value))
        return found.digest()


@dataclass(frozen=True)
class Table:
    """Rows of one source; a row need not have every column.

    Attributes:
        name: how messages call the source.
        columns: every column that some row has.
        rows: at least one row.
    """

    name: str
    columns: tuple[str, ...]
    rows: Sequence[Row]

    def require(self, column: str, setting: str) -> None:
        """Check that a column exists.

        Raises:
            DataError: it does not; the message lists those that do.
        """
        if column not in self.columns:
            raise DataError(
                f'{self.name} has no column "{column}"{near_miss(column, self.columns)}; '
                f"columns: {self.column_list}; set {setting} to one of them{self._header_hint}"
            )

    @property
    def column_list(self) -> str:
        """The columns for a message."""
        return ", ".join(column[:40] for column in self.columns)

    @property
    def _header_hint(self) -> str:
        if not self.name.lower().endswith((".csv", ".tsv")):
            return ""
        return ' (in a file without header to a column\'s number, from "0")'

    def column(self, column: str, setting: str) -> list[Any]:
        """The values of one column.

        Raises:
            DataError: no row, or not every row, has it.
        """
        self.require(column, setting)
        return [value_of(row, column) for row in self.rows]


def value_of(row: Row, column: str) -> Any:
    """The row's value of a column that the table has.

    Raises:
        DataError: this row lacks it.
    """
    if column not in row.values:
        raise DataError(
            f'{row.origin}: the row has no "{column}", which other rows have; '
            f"found {', '.join(row.values) or 'nothing'}; add it or remove the row"
        )
    return row.values[column]


def _written(value: Any) -> bytes:
    """A value as bytes; a picture as its pixels."""
    if isinstance(value, bytes):
        return value
    if hasattr(value, "tobytes"):
        pixels: bytes = value.tobytes()
        return pixels
    return json.dumps(value, sort_keys=True, default=repr).encode("utf-8", "surrogatepass")


def join_tables(name: str, tables: Iterable[Table]) -> Table:
    """The rows of all tables in order, with the columns of all."""
    parts = list(tables)
    columns = dict.fromkeys(column for table in parts for column in table.columns)
    return Table(name, tuple(columns), [row for table in parts for row in table.rows])
