"""What one machine reads is what a simulation gives it, or its own data whole."""

import pytest

from fedlora.config.job import DataSection, PartitionSection
from fedlora.data.federated import load_federated
from fedlora.data.own import CLIENTS, OwnData, held_out_only
from fedlora.errors import ConfigError, DataError

CLASSIFY = "sequence-classification"
PARTITIONS = [
    PartitionSection(kind="iid", clients=3),
    PartitionSection(kind="dirichlet", clients=3, alpha=0.5),
    PartitionSection(kind="natural", clients=0, column="site"),
]


def contents(examples):
    return [(e.inputs["input_ids"].tolist(), e.target.tolist()) for e in examples]


@pytest.fixture
def table(write):
    cells = [[f"text {n}", f"class {n % 4}", f"site {n % 5}"] for n in range(60)]
    return write("rows.csv", [["text", "label", "site"], *cells])


def read(reader, data, partition, tokenizer, task=CLASSIFY):
    return reader(data, partition, task, tokenizer=tokenizer, image_processor=None, seed=3)


@pytest.mark.parametrize("partition", PARTITIONS, ids=lambda p: p.kind)
def test_a_place_in_the_division_has_the_examples_of_the_simulation(table, tokenizer, partition):
    data = DataSection(source=str(table), max_rows=50)
    whole = read(load_federated, data, partition, tokenizer)
    for place, (name, client) in enumerate(whole.clients.items()):
        for reader, own in [
            (OwnData("elsewhere", partition=place), "elsewhere"),
            (OwnData(name), name),
        ]:
            found = read(reader, data, partition, tokenizer)
            assert list(found.clients) == [own]
            assert found.clients[own].name == own
            assert contents(found.clients[own].train) == contents(client.train)
            assert contents(found.clients[own].validation) == contents(client.validation)
            assert found.labels == whole.labels


def test_an_own_source_is_not_divided(table, tokenizer):
    classes = [f"class {n}" for n in range(5)]
    data = DataSection(source=CLIENTS, labels=classes)
    found = read(OwnData("here", source=str(table)), data, PARTITIONS[2], tokenizer)
    client = found.clients["here"]
    # a table of one client, as a simulation of one client would have it
    rows = contents(client.train) + contents(client.validation)
    alone = read(
        load_federated,
        DataSection(source=str(table), labels=classes),
        PartitionSection(kind="iid", clients=1),
        tokenizer,
    )
    other = next(iter(alone.clients.values()))
    assert sorted(rows) == sorted(contents(other.train) + contents(other.validation))
    assert len(rows) == 60
    assert found.labels == tuple(classes)
    # another client holds other rows of the same file back
    again = read(OwnData("there", source=str(table)), data, PARTITIONS[0], tokenizer)
    assert contents(again.clients["there"].validation) != contents(client.validation)


def test_classes_must_be_named_where_nobody_sees_all_data(table, tokenizer):
    for reader in (OwnData("here", source=str(table)), held_out_only):
        with pytest.raises(ConfigError, match="labels is empty"):
            read(reader, DataSection(source=CLIENTS), PARTITIONS[0], tokenizer)


def test_a_client_that_the_job_has_no_data_for(table, tokenizer):
    data = DataSection(source=str(table))
    with pytest.raises(DataError, match='did you mean "client-001"'):
        read(OwnData("client-01"), data, PARTITIONS[0], tokenizer)
    with pytest.raises(DataError, match="choose 0 to 2"):
        read(OwnData("x", partition=3), data, PARTITIONS[0], tokenizer)
    with pytest.raises(ConfigError, match="has no data of its own"):
        read(OwnData("x"), DataSection(source=CLIENTS), PARTITIONS[0], tokenizer)
    with pytest.raises(ConfigError, match="leaves the data with the clients"):
        read(load_federated, DataSection(source=CLIENTS), PARTITIONS[0], tokenizer)


def test_a_server_without_data_has_the_classes_and_the_test_file(table, tokenizer):
    classes = [f"class {n}" for n in range(4)]
    data = DataSection(source=CLIENTS, labels=classes)
    found = read(held_out_only, data, PARTITIONS[0], tokenizer)
    assert (found.clients, found.test, found.labels) == ({}, [], tuple(classes))
    tested = data.model_copy(update={"test": str(table)})
    assert len(read(held_out_only, tested, PARTITIONS[0], tokenizer).test) == 60
    spoken = read(held_out_only, DataSection(source=CLIENTS), PARTITIONS[0], tokenizer, "causal-lm")
    assert spoken.labels == ()
