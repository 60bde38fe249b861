"""The data of one machine of a deployed federation: one client's own, or the server's."""

import dataclasses
from typing import Any

from fedlora.config.job import DataSection, PartitionSection
from fedlora.data.federated import FederatedData, PreparedRows, load_test, prepare
from fedlora.data.source import CLIENTS
from fedlora.data.unusable import Unusable
from fedlora.errors import ConfigError, DataError, near_miss

__all__ = ["CLIENTS", "OwnData", "held_out_only"]


class OwnData:
    """Reads what one client trains on, and nothing of the others.

    Args:
        name: the client; it names its random streams.
        partition: its place, from 0, among the clients of the job's own division in the order
            of their names. Its examples are then those that a simulation gives that client.
        source: its own file or folder, which goes before `data.source`; all rows are its own.
            With neither, it is the client of its name in the job's division.
    """

    def __init__(
        self, name: str, *, partition: int | None = None, source: str | None = None
    ) -> None:
        assert partition is None or source is None, "a site's own source is not divided"
        self.name = name
        self.partition = partition
        self.source = source

    def __call__(
        self,
        data: DataSection,
        partition: PartitionSection,
        task: str,
        *,
        tokenizer: Any = None,
        image_processor: Any = None,
        seed: int,
    ) -> FederatedData:
        """The client's data; its validation examples are the test examples.

        Raises:
            ConfigError: the classes are not named, or the job has no data for this client.
            DataError: the data cannot be read, or have no such client.
        """
        if self.source is not None:
            _need_labels(data, task)
            data = data.model_copy(update={"source": self.source})
            # its sub-folders are classes, never clients
            partition = partition.model_copy(update={"kind": "iid", "clients": 1})
        elif data.source == CLIENTS:
            raise ConfigError(
                f'data.source = "{CLIENTS}", and client "{self.name}" has no data of its own; '
                "start it with: fedlora client --data PATH"
            )
        rows = prepare(
            data, partition, task, tokenizer=tokenizer, image_processor=image_processor, seed=seed
        )
        if self.source is not None:
            client = rows.client(self.name, range(len(rows.table.rows)))
        else:
            chosen, numbers = self._place(rows, partition)
            client = dataclasses.replace(rows.client(chosen, numbers), name=self.name)
        return FederatedData({self.name: client}, client.validation, rows.names, client.unusable)

    def _place(self, rows: PreparedRows, partition: PartitionSection) -> tuple[str, list[int]]:
        clients = sorted(rows.divide(partition).clients.items())
        if self.partition is not None:
            if not 0 <= self.partition < len(clients):
                raise DataError(
                    f"partition {self.partition} does not exist: the job divides "
                    f"{rows.table.name} among {len(clients)} clients; choose 0 to "
                    f"{len(clients) - 1}, or set partition.clients"
                )
            return clients[self.partition]
        names = [name for name, _ in clients]
        if self.name not in names:
            raise DataError(
                f'client "{self.name}" has no part of {rows.table.name}'
                f"{near_miss(self.name, names)}; its clients are {', '.join(names[:12])}"
                f"{' ...' if len(names) > 12 else ''}; take one of these names, or give the "
                "client its place or its own data (--partition, --data)"
            )
        return clients[names.index(self.name)]


def held_out_only(
    data: DataSection,
    partition: PartitionSection,
    task: str,
    *,
    tokenizer: Any = None,
    image_processor: Any = None,
    seed: int,
) -> FederatedData:
    """What a server has when every client brings its own data: classes, and `data.test` if set.

    Raises:
        ConfigError: the classes are not named.
        DataError: data.test cannot be read, or has no usable example.
    """
    assert data.source == CLIENTS, "with any other source the data are the server's too"
    _need_labels(data, task)
    test = []
    if data.test is not None:
        test = load_test(
            data,
            partition,
            task,
            labels=data.labels,
            tokenizer=tokenizer,
            image_processor=image_processor,
            seed=seed,
        )
    labels = () if task == "causal-lm" else tuple(data.labels)
    return FederatedData({}, test, labels, Unusable())


def _need_labels(data: DataSection, task: str) -> None:
    if task != "causal-lm" and not data.labels:
        raise ConfigError(
            "data.labels is empty; where clients bring their own data, the job must name the "
            "classes in order, because nobody sees all of them"
        )
