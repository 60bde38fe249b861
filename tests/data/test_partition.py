import random
from collections import Counter

import numpy as np
import pytest
import torch

from fedlora.data.partition import partition_rows, safe_names
from fedlora.data.rows import Row, Table
from fedlora.errors import DataError

KINDS = ["iid", "dirichlet", "shards", "pathological", "natural"]


def table_of(labels, clients=None):
    rows = [
        Row({"label": label, "n": n}, f"train.csv:{n + 2}", client=clients[n] if clients else None)
        for n, label in enumerate(labels)
    ]
    return Table("train.csv", ("label", "n"), rows)


TABLE = table_of([f"class-{n % 6}" for n in range(300)])


def divide(table, kind, clients=5, seed=0, column="label", **options):
    return partition_rows(table, kind, clients=clients, column=column, seed=seed, **options)


def classes(table, rows):
    return Counter(table.rows[row].values["label"] for row in rows)


@pytest.mark.parametrize("kind", KINDS)
def test_clients_are_disjoint_and_with_the_unassigned_complete(kind):
    division = divide(TABLE, kind, clients=None if kind == "natural" else 7)
    rows = [row for part in division.clients.values() for row in part]
    assert sorted([*rows, *division.unassigned]) == list(range(300))
    assert all(division.clients.values())
    assert all(part == sorted(part) for part in division.clients.values())
    assert list(division.clients) == sorted(division.clients)
    if kind in ("iid", "dirichlet", "natural"):
        assert not division.unassigned


@pytest.mark.parametrize("kind", ["iid", "dirichlet", "shards", "pathological"])
def test_the_seed_alone_decides(kind):
    before = torch.get_rng_state(), random.getstate(), str(np.random.get_state())
    first = divide(TABLE, kind)
    assert first == divide(TABLE, kind)
    assert first != divide(TABLE, kind, seed=1)
    assert divide(TABLE, kind, seed=2**53 - 1).clients
    after = torch.get_rng_state(), random.getstate(), str(np.random.get_state())
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]


def test_names_are_numbers_of_equal_width():
    assert list(divide(TABLE, "iid", 2).clients) == ["client-000", "client-001"]
    many = list(divide(table_of(["a"] * 1100), "iid", 1100).clients)
    assert many[0] == "client-0000"
    assert many[-1] == "client-1099"


def test_iid_sizes_differ_by_at_most_one_and_rows_are_mixed():
    division = divide(TABLE, "iid", 7)
    sizes = [len(rows) for rows in division.clients.values()]
    assert max(sizes) - min(sizes) <= 1
    assert all(len(classes(TABLE, rows)) == 6 for rows in division.clients.values())


def test_a_smaller_alpha_is_more_skewed():
    def largest_share(alpha):
        parts = divide(TABLE, "dirichlet", alpha=alpha, min_size=2).clients.values()
        return np.mean([max(classes(TABLE, rows).values()) / len(rows) for rows in parts])

    assert largest_share(0.2) > largest_share(1.0) > largest_share(1000.0)
    assert min(map(len, divide(TABLE, "dirichlet", min_size=20).clients.values())) >= 20


def test_shards_are_runs_of_sorted_labels():
    division = divide(TABLE, "shards", 10, per_client=2)
    assert {len(rows) for rows in division.clients.values()} == {30}
    assert all(len(classes(TABLE, rows)) <= 4 for rows in division.clients.values())


def test_pathological_clients_have_so_many_classes():
    division = divide(TABLE, "pathological", 6, per_client=2)
    assert all(len(classes(TABLE, rows)) == 2 for rows in division.clients.values())


def test_natural_clients_are_the_values():
    division = divide(TABLE, "natural", 4)
    assert list(division.clients) == [f"class-{n}" for n in range(4)]
    assert all(classes(TABLE, rows) == {name: 50} for name, rows in division.clients.items())


def test_integers_divide_like_strings():
    table = table_of([n % 6 for n in range(60)])
    for kind in KINDS:
        division = divide(table, kind, 3)
        assert len(division.clients) == 3
    assert list(divide(table, "natural", 3).clients) == ["0", "1", "2"]


def test_folders_are_clients():
    table = table_of(["x"] * 4, clients=["south", "north", "south", "a b"])
    assert divide(table, "folders", None).clients == {"a-b": [3], "north": [1], "south": [0, 2]}
    assert list(divide(table, "folders", 2).clients) == ["a-b", "north"]


def test_names_are_safe_and_different():
    names = safe_names(["a b", "a-b", "a/b", "ok_1.2", "../x", "..", "é", "x" * 300])
    assert names[1] == "a-b"
    assert names[3] == "ok_1.2"
    assert len(set(names)) == len(names)
    assert all(set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789._-") for name in names)
    assert not any(name.startswith(".") for name in names)
    assert max(map(len, names)) < 100


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("iid", {"clients": 301}, r"partition\.clients = 301 is more than the 300 rows of train"),
        ("natural", {"column": "lable"}, r'no column "lable" \(did you mean "label"\?\); columns'),
        ("dirichlet", {"column": "x"}, r'no column "x"; columns: label, n; set partition\.column'),
        (
            "dirichlet",
            {"alpha": 0.01, "clients": 30, "min_size": 9},
            r"alpha = 0\.01 gave each of 30 clients at least min_size = 9 rows.*choose a larger",
        ),
        ("shards", {"clients": 200, "per_client": 2}, r"need at least 400 rows; choose fewer"),
        ("pathological", {"per_client": 7}, r"300 rows with 6 values.*per_client = 7 classes"),
    ],
)
def test_impossible_divisions_are_explained(kind, options, message):
    with pytest.raises(DataError, match=message):
        divide(TABLE, kind, **options)


@pytest.mark.parametrize("value", [None, ["a"], {"k": 1}])
def test_rows_without_a_dividing_value_are_named(value):
    with pytest.raises(DataError, match=r'train\.csv:3: column "label" has no single value'):
        divide(table_of(["a", value]), "natural", None)
