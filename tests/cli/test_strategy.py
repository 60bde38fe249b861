"""`fedlora strategy list`, `new` and `check`."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fedlora.strategies import STRATEGIES
from fedlora.strategies.conformance import LAWS
from fedlora.strategies.wrappers import WRAPPERS
from tests.cli.command import fedlora

ROOT = Path(__file__).parents[2]

HEAD = """
from dataclasses import replace

import torch

from fedlora.strategies.fedit import FedIT
from fedlora.strategies.wrappers import Wrapper


class Mine(FedIT):
    name = "mine"
"""

BROKEN = {
    "raises in a round": (
        "    def reduce(self, state, updates):\n        return 1 / 0\n",
        "next-state",
        "ZeroDivisionError: division by zero",
    ),
    "raises when it is made": (
        "    def __init__(self, *args):\n        raise KeyError('x')\n",
        "waivers",
        "KeyError: 'x'",
    ),
    "raises in check": (
        "    def check(self, given):\n        raise RuntimeError('no')\n",
        "declared",
        "RuntimeError: no",
    ),
    "ends the program": (
        "    def refactor(self, state, stats):\n        raise SystemExit(0)\n",
        "next-state",
        "SystemExit: 0",
    ),
    "has no flag": ("    exact = 'no'\n", "declared", "exact = 'no'"),
    "divides by the number of clients": (
        "    def reduce(self, state, updates):\n"
        "        return replace(super().reduce(state, updates), weight=float(len(updates)))\n",
        "weights",
        "when all weights are 0.3 times as large",
    ),
}


@pytest.fixture
def call(monkeypatch, capsys):
    return lambda *words: fedlora(monkeypatch, capsys, "strategy", *words)


@pytest.fixture
def mine(tmp_path):
    def write(body, head=HEAD):
        path = tmp_path / "mine.py"
        path.write_text(head + body)
        return f"{path}:Mine"

    return write


def test_list_shows_every_strategy_and_what_it_declares(call):
    done = call("list")
    assert done.code == 0
    lines = done.out.splitlines()
    for name in (*STRATEGIES, *WRAPPERS):
        assert any(line.split()[:1] == [name] for line in lines)
    found = json.loads(call("list", "--json").out)
    assert [row["name"] for row in found["strategies"]] == list(STRATEGIES)
    assert [row["name"] for row in found["wrappers"]] == list(WRAPPERS)
    for row in found["strategies"]:
        kind = STRATEGIES[row["name"]]
        for flag in ("exact", "linear", "hetero_rank", "personal", "asynchronous", "needs"):
            assert row[flag] == getattr(kind, flag)
        assert row["privacy"] == sorted(kind.privacy)
    for row in (*found["strategies"], *found["wrappers"]):
        assert row["options"] == {**STRATEGIES, **WRAPPERS}[row["name"]].options
        for key, value in row["options"].items():
            written = f"{key} = {json.dumps(value)}"
            assert any(row["name"] == s.split()[0] and written in s for s in lines if s)
        assert row["what"].endswith(".")


def test_what_new_writes_passes_check_ruff_and_mypy(call, tmp_path):
    path = tmp_path / "my_mean.py"
    done = call("new", path)
    assert done.code == 0
    assert f"fedlora strategy check {path}:MyStrategy" in done.out
    assert 'name = "my-mean"' in path.read_text()
    found = json.loads(call("check", f"{path}:MyStrategy", "--json").out)
    assert found["passed"]
    assert {"lora", "dora", "miss"} <= set(found["methods"])
    assert {law["law"] for law in found["laws"] if law["verdict"] == "waived"} == {
        "same",
        "alone",
        "still",
    }
    config = ["--config", str(ROOT / "pyproject.toml")]
    for command in (
        ["ruff", "check", *config, str(path)],
        ["ruff", "format", "--check", *config, str(path)],
        ["mypy", "--config-file", str(ROOT / "pyproject.toml"), str(path)],
    ):
        made = subprocess.run(
            [sys.executable, "-m", *command], capture_output=True, text=True, cwd=ROOT, check=False
        )
        assert made.returncode == 0, made.stdout + made.stderr


def test_new_overwrites_nothing(call, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("precious\n")
    done = call("new", path)
    assert (done.code, path.read_text()) == (2, "precious\n")
    assert "exists and is not overwritten" in done.err
    assert call("new", tmp_path / "mine").code == 2
    assert "cannot be written" in call("new", tmp_path / "none" / "mine.py").err


@pytest.mark.parametrize("case", BROKEN)
def test_check_explains_what_is_broken(call, mine, case):
    body, law, found = BROKEN[case]
    name = mine(body)
    done = call("check", name)
    assert done.code == 2
    assert f"BROKEN  {law} " in done.out
    for title in ("law", "found", "expected", "usually", "look at"):
        assert f"  {title:<9} " in done.out
    assert "Traceback" not in done.out + done.err
    report = json.loads(call("check", name, "--json").out)
    broken = {entry["law"]: entry for entry in report["laws"] if entry["verdict"] == "broken"}
    assert not report["passed"]
    assert found in broken[law]["found"]
    assert broken[law].keys() >= {"meaning", "expected", "cause", "look", "method", "ranks"}


def test_the_line_that_raised_is_named(call, mine):
    name = mine("    def reduce(self, state, updates):\n        return 1 / 0\n")
    line = 1 + HEAD.count("\n") + 1
    assert f"mine.py, line {line}, in reduce" in " ".join(call("check", name).out.split())


def test_a_plug_in_that_prints_does_not_spoil_the_json(call, mine):
    done = call(
        "check",
        mine("    def factors(self, state):\n        print('x'); return ('A', 'B')\n"),
        "--json",
    )
    assert json.loads(done.out)["strategy"].endswith("mine.py:Mine")


def test_a_wrapper_is_tried_around_a_strategy(call, mine):
    body = "class Mine(Wrapper):\n    name = 'mine'\n"
    assert call("check", mine(body, HEAD.split("class Mine")[0])).code == 0


@pytest.mark.parametrize(
    ("body", "head", "message"),
    [
        ("", "import sys\nsys.exit(0)\n", "cannot be imported: SystemExit"),
        ("", "1 / 0\n", "mine.py, line 1)"),
        ("", "\n", "has no strategy class 'Mine'"),
        (
            "    def check(self, given):\n"
            "        from fedlora.errors import ConfigError\n"
            "        raise ConfigError('never on a Sunday')\n",
            HEAD,
            "never on a Sunday",
        ),
    ],
)
def test_what_cannot_be_tried_says_why(call, mine, body, head, message):
    done = call("check", mine(body, head))
    assert done.code == 2
    assert message in done.err
    assert "Traceback" not in done.err


def test_every_built_in_strategy_passes_its_own_check(call):
    report = json.loads(call("check", "ffa-lora", "--json").out)
    assert report["passed"]
    names = {law.name for law in LAWS}
    assert {entry["law"] for entry in report["laws"]} == names
