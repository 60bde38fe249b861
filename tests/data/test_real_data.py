"""Public data sets, from the folder that FEDLORA_DATA names."""

import os
from pathlib import Path

import pytest

from fedlora.config.job import DataSection, PartitionSection
from fedlora.data.example import IGNORE
from fedlora.data.federated import load_federated

FOLDER = os.environ.get("FEDLORA_DATA")
pytestmark = pytest.mark.skipif(
    FOLDER is None, reason="FEDLORA_DATA does not name a folder with the public data sets"
)


def path(name):
    file = Path(FOLDER) / name
    if not file.exists():
        pytest.skip(f"{file} does not exist")
    return str(file)


def test_banking77_divides_by_dirichlet(tokenizer):
    data = DataSection(
        source=path("banking77_train.csv"), label="category", test=path("banking77_test.csv")
    )
    partition = PartitionSection(kind="dirichlet", clients=8, alpha=0.3)
    loaded = load_federated(data, partition, "sequence-classification", tokenizer=tokenizer, seed=0)
    assert len(loaded.labels) == 77
    assert len(loaded.test) == 3080
    assert sum(sum(c.composition.values()) for c in loaded.clients.values()) == 10_003
    assert loaded.unusable.num_dropped == 0


def test_gsm8k_counts_answers_only(tokenizer):
    data = DataSection(
        source=path("gsm8k_train.jsonl"),
        prompt="question",
        completion="answer",
        max_length=1024,
        max_rows=400,
    )
    loaded = load_federated(
        data, PartitionSection(kind="iid", clients=4), "causal-lm", tokenizer=tokenizer, seed=0
    )
    examples = [e for c in loaded.clients.values() for e in [*c.train, *c.validation]]
    assert len(examples) + loaded.unusable.num_dropped == 400
    for example in examples:
        counted = tokenizer.decode(example.target[example.target != IGNORE])
        assert "####" in example.answer
        assert (example.answer + "</s>").startswith(counted.removesuffix("�"))


def test_sst2_is_read_without_header(tokenizer):
    data = DataSection(
        source=path("sst2_train.tsv"), text="1", label="0", test=path("sst2_dev.tsv")
    )
    loaded = load_federated(
        data,
        PartitionSection(kind="shards", clients=10),
        "sequence-classification",
        tokenizer=tokenizer,
        seed=0,
    )
    assert loaded.labels == ("0", "1")
    assert len(loaded.test) == 872
    assert sum(sum(c.composition.values()) for c in loaded.clients.values()) == 6920
