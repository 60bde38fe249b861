"""Reading one data file: JSON lines, CSV, TSV, Parquet or plain text."""

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from fedlora.data.rows import Row, Table
from fedlora.errors import DataError

TABLE_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")

_LARGEST_CELL = 2**31 - 1  # csv's own limit of 128 KiB is shorter than many documents


def read_file(path: Path, *, numbered: frozenset[str] = frozenset()) -> Table:
    """Every row of a data file, told by its suffix.

    A .csv file may quote its cells; a .tsv file has no quoting, so each line is a row. A table
    is read without a header when the job names columns by number and the first line does not
    hold those names; its columns are then called "0", "1" and so on.

    Args:
        path: a .jsonl, .json (one object per line), .csv, .tsv or .parquet file.
        numbered: the columns that the job names by number, such as {"0", "1"}.

    Raises:
        DataError: the file cannot be read, has no rows, or has a malformed row.
    """
    suffix = path.suffix.lower()
    if suffix in (".jsonl", ".json"):
        rows = list(_json_rows(path))
    elif suffix in (".csv", ".tsv"):
        rows = list(_delimited_rows(path, numbered))
    elif suffix == ".parquet":
        rows = _parquet_rows(path)
    else:
        raise DataError(
            f'{path}: files that end in "{path.suffix}" are not read; '
            f"expected one of {', '.join(TABLE_SUFFIXES)}"
        )
    if not rows:
        raise DataError(f"{path}: the file has no rows; expected at least one")
    columns = dict.fromkeys(column for row in rows for column in row.values)
    return Table(str(path), tuple(columns), rows)


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, without a byte order mark.

    Raises:
        DataError: it cannot be opened, or is not UTF-8; names the line.
    """
    try:
        raw = path.read_bytes()
    except OSError as e:
        raise DataError(f"{path}: cannot be read ({e.strerror}); check that it exists") from e
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        line = raw.count(b"\n", 0, e.start) + 1
        raise DataError(
            f"{path}:{line}: byte 0x{raw[e.start]:02x} is not UTF-8; save the file as UTF-8"
        ) from e


def _json_rows(path: Path) -> Iterator[Row]:
    text = read_text(path)
    # str.splitlines would also split at characters that JSON strings may hold
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        origin = f"{path}:{number}"
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as e:
            whole = number == 1 and line.lstrip().startswith(("[", "{"))
            hint = "; a file that is one JSON value must be rewritten" if whole else ""
            raise DataError(
                f"{origin}: invalid JSON ({e}); expected one object per line{hint}"
            ) from e
        if not isinstance(value, dict):
            raise DataError(
                f"{origin}: the line is {json_kind(value)}; expected one JSON object per line"
            )
        yield Row(value, origin, path.parent)


def json_kind(value: Any) -> str:
    """What a value is called in a message: "a number (3)", "a list" and so on."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return f"a truth value ({str(value).lower()})"
    if isinstance(value, int | float):
        return f"a number ({value})"
    if isinstance(value, str):
        return f'a string ("{value[:40]}")'
    if isinstance(value, list | tuple):
        return "a list"
    if isinstance(value, dict):
        return "an object"
    return f"a {type(value).__name__}"


def _delimited_rows(path: Path, numbered: frozenset[str]) -> Iterator[Row]:
    text = read_text(path)
    limit = csv.field_size_limit(_LARGEST_CELL)
    try:
        yield from _rows_of_cells(path, _cells(path, text), numbered)
    finally:
        csv.field_size_limit(limit)


def _cells(path: Path, text: str) -> Iterator[tuple[int, list[str]]]:
    # line number (of a row's first line) and cells; empty lines are passed over
    if path.suffix.lower() == ".tsv":
        for number, line in enumerate(text.split("\n"), 1):
            if line := line.removesuffix("\r"):
                yield number, line.split("\t")
        return
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    start = 1
    while True:
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as e:
            raise DataError(
                f"{path}:{start}: malformed CSV ({e}); expected cells with quotes in pairs"
            ) from e
        if cells:
            yield start, cells
        start = reader.line_num + 1


def _rows_of_cells(
    path: Path, lines: Iterator[tuple[int, list[str]]], numbered: frozenset[str]
) -> Iterator[Row]:
    header: list[str] | None = None
    for number, cells in lines:
        if header is None:
            if not numbered or numbered <= set(cells):
                header = _checked_header(path, number, cells)
                continue
            header = [str(place) for place in range(len(cells))]
        if len(cells) != len(header):
            raise DataError(
                f"{path}:{number}: the row has {len(cells)} cells; expected {len(header)} "
                f"({', '.join(header)}); quote cells of a .csv that hold commas"
            )
        yield Row(dict(zip(header, cells, strict=True)), f"{path}:{number}", path.parent)


def _checked_header(path: Path, number: int, cells: list[str]) -> list[str]:
    names = [cell.strip() for cell in cells]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DataError(
            f'{path}:{number}: the header has the column "{twice[0]}" more than once; expected '
            "different names (for a file without header, name columns by number, from 0)"
        )
    return names


def _parquet_rows(path: Path) -> list[Row]:
    try:
        table = pq.read_table(path)
    except (pa.ArrowException, OSError) as e:
        raise DataError(f"{path}: not a readable Parquet file ({e}); write it again") from e
    return [
        Row(values, f"{path}:{number}", path.parent)
        for number, values in enumerate(table.to_pylist(), 1)
    ]
