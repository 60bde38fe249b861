"""Dividing the rows of one source among clients, by the partitioners of flwr-datasets."""

import contextlib
import hashlib
import io
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import Dataset
from flwr_datasets.partitioner import (
    DirichletPartitioner,
    IidPartitioner,
    NaturalIdPartitioner,
    PathologicalPartitioner,
    ShardPartitioner,
)

from fedlora.data.labelled import sorted_names
from fedlora.data.rows import Table
from fedlora.errors import DataError
from fedlora.seeds import derive_seed, generator

_ROW, _VALUE = "row", "value"
_LONGEST_NAME = 80  # a client's name becomes part of file names


@dataclass(frozen=True)
class Partition:
    """Which rows each client has.

    Attributes:
        clients: client to its row numbers, ascending; by name.
        unassigned: rows that no client got: the rest of a division into equal shards, or
            classes that no client was given; ascending.
        beyond: rows of clients beyond the number asked for; ascending.
    """

    clients: dict[str, list[int]]
    unassigned: list[int]
    beyond: list[int] = field(default_factory=list)


def partition_rows(
    table: Table,
    kind: str,
    *,
    clients: int | None,
    column: str,
    alpha: float = 0.5,
    min_size: int = 2,
    per_client: int = 2,
    seed: int,
) -> Partition:
    """Divide the rows of a table.

    Args:
        table: the rows.
        kind: "iid", "dirichlet", "shards", "pathological", "natural" or "folders".
        clients: number of clients; for "natural" and "folders" the most to keep, by name.
        column: column that skews or names the clients (not for "iid" and "folders").
        alpha: Dirichlet concentration.
        min_size: fewest rows of a Dirichlet client.
        per_client: shards or classes per client.
        seed: the run's seed.

    Raises:
        DataError: the rows cannot be divided so; says which setting to change.
    """
    if kind == "folders":
        return _by_value([row.client or "" for row in table.rows], clients)
    if kind == "natural":
        return _by_value(_values(table, column), clients)
    assert clients is not None, f"partition.kind {kind!r} needs a number of clients"
    num_rows = len(table.rows)
    if clients > num_rows:
        raise DataError(
            f"partition.clients = {clients} is more than the {num_rows} rows of {table.name}; "
            f"choose at most {num_rows}"
        )
    order = torch.randperm(num_rows, generator=generator(seed, "partition", "order")).tolist()
    columns = {_ROW: order}
    have = f"{table.name} has {num_rows} rows"
    if kind != "iid":
        values = _values(table, column)
        # numbers instead of values: partitioners compare values, and mixed types have no order
        code = {name: place for place, name in enumerate(sorted_names(values))}
        columns[_VALUE] = [code[values[row]] for row in order]
        have += f' with {len(code)} values of column "{column}"'
    # numpy takes any seed, but a 32-bit one is safe in every version
    seed_32 = derive_seed(seed, "partition", kind) & 0xFFFFFFFF
    partitioner, advice = _partitioner(kind, clients, alpha, min_size, per_client, seed_32)
    try:
        parts = _load_parts(partitioner, columns, clients)
    # more shards than rows end in a division by zero there
    except (ValueError, ZeroDivisionError) as e:
        raise DataError(f"partition: {have}; {advice}") from e
    width = max(3, len(str(clients - 1)))
    named = {f"client-{place:0{width}}": sorted(rows) for place, rows in enumerate(parts)}
    for name, rows in named.items():
        if not rows:
            raise DataError(f'client "{name}" got no rows: {have}; {advice}')
    assigned = {row for rows in parts for row in rows}
    return Partition(named, [row for row in range(num_rows) if row not in assigned])


def _partitioner(
    kind: str, clients: int, alpha: float, min_size: int, per_client: int, seed: int
) -> tuple[Any, str]:
    # and what to tell when it finds no division
    if kind == "iid":
        return IidPartitioner(clients), "choose fewer clients"
    if kind == "dirichlet":
        return (
            DirichletPartitioner(
                clients, _VALUE, float(alpha), min_partition_size=min_size, seed=seed
            ),
            f"no Dirichlet division with alpha = {alpha} gave each of {clients} clients at least "
            f"min_size = {min_size} rows (11 draws); choose a larger alpha, fewer clients or a "
            "smaller min_size",
        )
    if kind == "shards":
        return (
            ShardPartitioner(clients, _VALUE, num_shards_per_partition=per_client, seed=seed),
            f"{clients} clients of per_client = {per_client} shards need at least "
            f"{clients * per_client} rows; choose fewer clients or a smaller per_client",
        )
    return (
        # as in the paper: the first class of each client in turn, so that few classes are unused
        PathologicalPartitioner(clients, _VALUE, per_client, "first-deterministic", seed=seed),
        f"{clients} clients cannot have per_client = {per_client} classes each, with a row of "
        "every one of them; choose fewer clients or a smaller per_client",
    )


def _values(table: Table, column: str) -> list[str]:
    values = table.column(column, "partition.column")
    for row, value in zip(table.rows, values, strict=True):
        if value is None or isinstance(value, list | dict | bytes):
            raise DataError(
                f'{row.origin}: column "{column}" has no single value (found '
                f"{type(value).__name__}), but divides the rows among clients; correct the row "
                "or set partition.column to another column"
            )
    return [str(value) for value in values]


def _load_parts(partitioner: Any, columns: dict[str, list[int]], clients: int) -> list[list[int]]:
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        # retries and unused classes are told by our own error and report; progress bars by none
        warnings.simplefilter("ignore")
        partitioner.dataset = Dataset.from_dict(columns)
        return [list(partitioner.load_partition(place)[_ROW]) for place in range(clients)]


def _by_value(values: Sequence[str], clients: int | None) -> Partition:
    names = sorted_names(values)
    code = {name: place for place, name in enumerate(names)}
    columns = {_ROW: list(range(len(values))), _VALUE: [code[value] for value in values]}
    parts = _load_parts(NaturalIdPartitioner(_VALUE), columns, len(names))
    named = sorted(zip(safe_names(names), parts, strict=True))
    beyond = [] if clients is None else [row for _, rows in named[clients:] for row in rows]
    kept = {name: sorted(rows) for name, rows in named[:clients]}
    return Partition(kept, [], sorted(beyond))


def safe_names(values: Sequence[str]) -> list[str]:
    """A client name for each different value: only letters, digits, ".", "_" and "-".

    Two values that would become the same name get a piece of their SHA-256 behind it.
    """
    plain = [re.sub(r"[^A-Za-z0-9._-]+", "-", value).strip("-") for value in values]
    # "." and ".." are no file names, a leading dot hides a file
    plain = [name if name and not name.startswith(".") else f"client{name}" for name in plain]
    plain = [name[:_LONGEST_NAME] for name in plain]
    return [
        name if name == value or plain.count(name) == 1 else f"{name}-{_digest(value)}"
        for name, value in zip(plain, values, strict=True)
    ]


def _digest(value: str) -> str:
    return hashlib.sha256(value.encode()).hexdigest()[:8]
