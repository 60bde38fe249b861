"""The fault matrix names every fault and tests that exist, as often as it says."""

import ast
import importlib
from math import prod
from pathlib import Path

import pytest

from tests.faults.matrix import MATRIX
from tests.faults.row import render

TESTS = Path(__file__).parents[1]
PAGE = TESTS.parent / "docs" / "faults.md"
FAULTS = (
    "server killed",
    "SuperLink killed",
    "client killed in training",
    "client killed between",
    "reply lost, doubled or out of order",
    "stale or replayed update",
    "slow client",
    "fewer clients than the quorum",
    "NaN, infinity, a huge norm, zero",
    "wrong shape, rank or type",
    "a lie about the number of examples",
    "oversized or malformed body",
    "a client without a certificate",
    "a man in the middle",
    "a server that asks for more",
    "clocks",
    "disk full",
    "a flipped bit",
    "torn tail of a ledger",
    "ledger deleted, swapped or rolled back",
    "a client's memory",
    "200 clients",
    "an update of 2.1 GiB",
    "another version",
    "a seed for the noise",
)
CASES = sorted(
    {case for row in MATRIX for case in (*row.local, *row.deployed)},
    key=lambda case: (case.test, case.repetitions),
)


def test_every_fault_has_one_row():
    assert len(MATRIX) == len(FAULTS)
    for fault in FAULTS:
        assert sum(row.fault.startswith(fault) for row in MATRIX) == 1, fault


def test_every_row_has_a_test_or_says_when_it_will():
    for row in MATRIX:
        assert row.local or row.deployed or row.later, row.fault


def test_the_page_has_the_table():
    assert f"\n\n{render(MATRIX)}\n\n" in PAGE.read_text()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.test.partition("::")[2])
def test_a_named_test_exists_and_runs_as_often_as_it_says(case):
    path, _, name = case.test.partition("::")
    source = ast.parse((TESTS / path).read_text())
    [function] = [
        node for node in source.body if isinstance(node, ast.FunctionDef) and node.name == name
    ]
    if case.repetitions > 1:
        assert repetitions(path, function.name) == case.repetitions


def repetitions(path, name):
    """How often a test runs, by its parameters; of those with a number inside, the largest."""
    module = importlib.import_module(f"tests.{path.removesuffix('.py').replace('/', '.')}")
    marks = [m for m in getattr(module, name).pytestmark if m.name == "parametrize"]
    found = []
    for mark in marks:
        names, values = mark.args
        values = [getattr(value, "values", (value,))[0] for value in values]
        if names in ("trials", "times"):
            found.append(max(values))
        elif names in ("seed", "repetition"):
            found.append(len(values))
    return prod(found) if found else len(getattr(module, "SEEDS", ()))
