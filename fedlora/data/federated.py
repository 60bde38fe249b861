"""FederatedData: what every client of a run trains on, as a job describes it."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fedlora.config.job import DataSection, PartitionSection
from fedlora.data.encoder import Encoder, encode_first
from fedlora.data.example import Example
from fedlora.data.formats import build_encoder, find_labels, resolve_format
from fedlora.data.labelled import Labels, sorted_names
from fedlora.data.partition import Partition, partition_rows
from fedlora.data.rows import Row, Table
from fedlora.data.source import BUILTIN, CLIENTS, read_source
from fedlora.data.unusable import BEYOND, UNASSIGNED, Unusable
from fedlora.errors import ConfigError, DataError
from fedlora.seeds import generator


@dataclass(frozen=True)
class ClientData:
    """One client's examples.

    Attributes:
        name: the client.
        train: at least one example.
        validation: examples of other rows than `train`; at least one row is kept for it where
            the client has two.
        unusable: its rows that gave no example or were cut.
        composition: rows per class, or per value of the partition's column where there are no
            classes; {"rows": n} where there is neither.
        records: digest of every row, which name the data set whatever becomes of the rows.
    """

    name: str
    train: list[Example]
    validation: list[Example]
    unusable: Unusable
    composition: dict[str, int]
    records: tuple[bytes, ...] = ()


@dataclass(frozen=True)
class FederatedData:
    """All clients' examples.

    Attributes:
        clients: by name, sorted.
        test: for the global figures; from data.test, or every client's validation examples.
        labels: class names in order of the targets; empty for language models.
        unusable: of all clients, the test file, and rows that no client got.
    """

    clients: dict[str, ClientData]
    test: list[Example]
    labels: tuple[str, ...]
    unusable: Unusable


def load_federated(
    data: DataSection,
    partition: PartitionSection,
    task: str,
    *,
    tokenizer: Any = None,
    image_processor: Any = None,
    seed: int,
) -> FederatedData:
    """Read, divide and encode the data of a job; the same for the same arguments.

    Args:
        data: where rows come from and how they become examples.
        partition: how they are divided.
        task: "causal-lm", "sequence-classification" or "image-classification".
        tokenizer: the model's tokenizer, for texts.
        image_processor: the model's image processor, for pictures.
        seed: the run's seed.

    Raises:
        ConfigError: data.format does not go with the task.
        DataError: the data cannot be read, encoded or divided as described.
    """
    rows = prepare(
        data, partition, task, tokenizer=tokenizer, image_processor=image_processor, seed=seed
    )
    division = rows.divide(partition)
    clients = {
        name: rows.client(name, numbers) for name, numbers in sorted(division.clients.items())
    }
    unassigned = Unusable()
    for number in division.unassigned:
        unassigned.drop(UNASSIGNED, rows.table.rows[number].origin)
    for number in division.beyond:
        unassigned.drop(BEYOND, rows.table.rows[number].origin)
    parts = [client.unusable for client in clients.values()]
    if data.test is None:
        test = [example for client in clients.values() for example in client.validation]
        source = f"the validation parts of all clients ({rows.table.name})"
    else:
        test, unusable = _test(data, partition, rows.encoder)
        parts.append(unusable)
        source = f'data.test = "{data.test}"'
    if not test:
        raise DataError(
            f"{source}: no usable example to test on; expected at least one; name a "
            "file in data.test, or give clients two rows or more"
        )
    return FederatedData(clients, test, rows.names, Unusable.merge([*parts, unassigned]))


def prepare(
    data: DataSection,
    partition: PartitionSection,
    task: str,
    *,
    tokenizer: Any,
    image_processor: Any,
    seed: int,
) -> "PreparedRows":
    """The rows of a source, checked; see `load_federated`.

    Raises:
        ConfigError: data.format does not go with the task, or the source is "clients".
        DataError: the data cannot be read or encoded as described.
    """
    if data.source == CLIENTS:
        raise ConfigError(
            f'data.source = "{CLIENTS}" leaves the data with the clients: there are none on this '
            "machine; name a source here, or start clients with: fedlora client --data PATH"
        )
    table = _read(data, partition, data.source, client_folders=partition.kind == "folders")
    form = resolve_format(data, task, table)
    labels = find_labels(data, table) if form.startswith("labelled") else None
    encoder = build_encoder(
        data, form, labels, tokenizer=tokenizer, image_processor=image_processor
    )
    for row in table.rows:
        encoder.check(row)
    if data.max_rows is not None and data.max_rows < len(table.rows):
        order = torch.randperm(len(table.rows), generator=generator(seed, "max_rows")).tolist()
        rows = [table.rows[place] for place in order[: data.max_rows]]
        table = Table(table.name, table.columns, rows)
    column = partition.column or ("area" if data.source == BUILTIN else data.label)
    return PreparedRows(data, table, encoder, labels, column, seed)


@dataclass(frozen=True)
class PreparedRows:
    """The rows of a source, and how they become the examples of clients.

    Attributes:
        labels: the classes; None for language models.
        column: column that skews or names the clients.
        seed: the run's seed.
    """

    data: DataSection
    table: Table
    encoder: Encoder
    labels: Labels | None
    column: str
    seed: int

    @property
    def names(self) -> tuple[str, ...]:
        """Class names in order of the targets; empty for language models."""
        return self.labels.names if self.labels else ()

    def divide(self, partition: PartitionSection) -> Partition:
        """Which client has which rows.

        Raises:
            DataError: the rows cannot be divided so.
        """
        return partition_rows(
            self.table,
            partition.kind,
            clients=partition.clients or None,
            column=self.column,
            alpha=partition.alpha,
            min_size=partition.min_size,
            per_client=partition.per_client,
            seed=self.seed,
        )

    def client(self, name: str, numbers: Sequence[int]) -> ClientData:
        """The examples of the client that has these rows; `name` names the random streams.

        Raises:
            DataError: not one training example.
        """
        rows = [self.table.rows[number] for number in numbers]
        num_validation = 0
        if len(rows) >= 2:
            wanted = round(len(rows) * self.data.validation_fraction)
            num_validation = min(max(wanted, 1), len(rows) - 1)
        order = torch.randperm(
            len(rows), generator=generator(self.seed, "validation", name)
        ).tolist()
        held_out, kept = order[:num_validation], sorted(order[num_validation:])
        train, unusable = self.encoder.encode([rows[place] for place in kept])
        validation, more = encode_first(
            self.encoder, [rows[place] for place in held_out], self.data.max_validation
        )
        unusable = Unusable.merge([unusable, more])
        if not train:
            raise DataError(
                f'client "{name}" has no training example: {len(rows)} rows, {num_validation} of '
                f"them for validation, unusable: {unusable.counts or 'none'}; expected at least "
                "one; give it more rows (fewer clients, a larger partition.min_size) or correct "
                "them"
            )
        return ClientData(
            name,
            train,
            validation,
            unusable,
            _composition(rows, self.labels, self.column),
            tuple(row.digest() for row in rows),
        )


def load_test(
    data: DataSection,
    partition: PartitionSection,
    task: str,
    *,
    labels: Sequence[str] = (),
    tokenizer: Any = None,
    image_processor: Any = None,
    seed: int,
) -> list[Example]:
    """The test examples of a job, without the clients' training data where `data.test` is set.

    Args:
        data, partition, task, tokenizer, image_processor, seed: see `load_federated`.
        labels: class names in the order a trained head has them.

    Raises:
        ConfigError, DataError: see `load_federated`.
    """
    if labels:
        data = data.model_copy(update={"labels": list(labels)})
    if data.test is None:
        return load_federated(
            data,
            partition,
            task,
            tokenizer=tokenizer,
            image_processor=image_processor,
            seed=seed,
        ).test
    table = _read(data, partition, data.test, client_folders=False)
    form = resolve_format(data, task, table)
    names = find_labels(data, table) if form.startswith("labelled") else None
    encoder = build_encoder(data, form, names, tokenizer=tokenizer, image_processor=image_processor)
    examples, unusable = _test(data, partition, encoder)
    if not examples:
        raise DataError(
            f'data.test = "{data.test}": no usable example; unusable: {unusable.counts or "none"}'
        )
    return examples


def _read(
    data: DataSection, partition: PartitionSection, source: str, *, client_folders: bool
) -> Table:
    named = (data.text, data.label, data.prompt, data.completion, data.messages, data.image)
    return read_source(
        source,
        client_folders=client_folders,
        subset=data.subset,
        split=data.split,
        text=data.text,
        image=data.image,
        label=data.label,
        numbered=frozenset(
            name for name in (*named, partition.column) if name is not None and name.isdecimal()
        ),
    )


def _composition(rows: Sequence[Row], labels: Labels | None, column: str) -> dict[str, int]:
    if labels:
        counted = Counter(labels.name(row) for row in rows)
        return {name: counted[name] for name in labels.names if counted[name]}
    if not all(column in row.values for row in rows):
        return {"rows": len(rows)}
    counted = Counter(str(row.values[column]) for row in rows)
    return {name: counted[name] for name in sorted_names(counted)}


def _test(
    data: DataSection, partition: PartitionSection, encoder: Encoder
) -> tuple[list[Example], Unusable]:
    assert data.test is not None
    if not Path(data.test).expanduser().exists():
        raise DataError(f'data.test = "{data.test}" does not exist; expected a file or a folder')
    table = _read(data, partition, data.test, client_folders=False)
    for row in table.rows:
        encoder.check(row)
    return encoder.encode(table.rows)
