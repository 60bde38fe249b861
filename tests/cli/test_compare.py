"""`fedlora compare` from the command line, on a tiny job."""

import csv
import json
import shutil

import pytest

from tests.cli.command import fedlora

BROKEN = """
from fedlora.strategies.fedit import FedIT


class Broken(FedIT):
    name = "broken"

    def reduce(self, state, updates):
        if state.round == 1:
            raise ValueError("no luck")
        return super().reduce(state, updates)
"""


@pytest.fixture
def cli(monkeypatch, capsys):
    def call(*words):
        return fedlora(monkeypatch, capsys, *words)

    return call


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_compare_makes_one_table_and_one_plot_and_continues(cli, job, tmp_path):
    out = tmp_path / "comparison"
    words = ["compare", job, "--out", out, "--strategies", "fedit,ffa-lora,rolora"]
    words += ["--baselines", "local,centralised", "--seeds", "2"]
    done = cli(*words)
    assert done.code == 0, done
    found = json.loads((out / "comparison.json").read_text())
    labels = [(run["label"], run["seed"]) for run in found["runs"]]
    names = ("fedit", "ffa-lora", "rolora", "local", "centralised")
    assert labels == [(name, seed) for seed in (0, 1) for name in names]
    for name in ("comparison.html", "comparison.png", "table.md"):
        assert (out / name).stat().st_size > 0
    assert [row["label"] for row in rows(out / "summary.csv")] == list(names)
    errors = {run["label"]: run["aggregation_error"] for run in found["runs"]}
    assert errors["fedit"] > 1e-4
    assert errors["ffa-lora"] < 1e-5
    assert errors["rolora"] < 1e-5
    assert (out / "table.md").read_text().splitlines()[0] in done.out
    shutil.rmtree(out / "runs" / "fedit-seed1")
    assert cli(*words).code == 0
    again = json.loads((out / "comparison.json").read_text())
    assert again["runs"][5]["curve"] == found["runs"][5]["curve"]


def test_variants_levels_bytes_and_a_failing_contender(cli, job, tmp_path):
    plugin = tmp_path / "broken.py"
    plugin.write_text(BROKEN)
    out = tmp_path / "comparison"
    done = cli(
        *("compare", job, "--out", out, "--skew", "1,10", "--equal", "bytes", "--json"),
        *("--variant", "slow one: training.learning_rate=1e-4 federation.strategy='ffa-lora'"),
        *("--variant", f"broken: federation.strategy={plugin}:Broken"),
    )
    assert done.code == 3, done
    assert "broken, alpha 1, seed 0 failed" in done.err
    assert "broken, alpha 10, seed 0 failed" in done.err
    assert "Traceback" not in done.err
    found = json.loads(done.out)
    assert found == json.loads((out / "comparison.json").read_text())
    # variants alone: fedit is not added, and the first of them is the reference
    assert found["reference"] == "slow one"
    assert [(r["skew"], r["label"], r["status"]) for r in found["runs"]] == [
        (skew, label, status)
        for skew in (1.0, 10.0)
        for label, status in (("slow one", "done"), ("broken", "failed"))
    ]
    assert (out / "runs" / "slow_one-alpha10-seed0" / "HEAD").is_file()
    assert {row["failed"] for row in rows(out / "summary.csv")} == {"0", "1"}
    assert len(rows(out / "curves.csv")) == 2 * (2 + 1)


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--variant", "no colon"], ["--variant 'no colon'", "label: section.key=value"]),
        (["--variant", "x: "], ["label: section.key=value"]),
        (["--variant", "x: a='b"], ["cannot be split"]),
        (["--variant", "x: training.learning_rat=1"], ["contender 'x'", "learning_rate"]),
        (["--variant", "fedit: run.seed=1", "--strategies", "fedit"], ["share the folder name"]),
        (["--skew", "0.1,x"], ["--skew '0.1,x'"]),
        (["--skew", "1", "-o", "partition.kind=natural"], ['"natural"', "leave --skew out"]),
        (["--equal", "steps"], ["--equal 'steps'", "rounds, bytes"]),
        (["--strategies", ""], ["nothing to compare"]),
        (["--strategies", "fedti", "--baselines", "x"], ["fedti", "'x' is not known"]),
    ],
)
def test_a_wrong_word_is_refused(cli, job, tmp_path, words, parts):
    done = cli("compare", job, "--out", tmp_path / "c", *words)
    assert done.code == 2, done
    assert "Traceback" not in done.err
    for part in parts:
        assert part in done.err, done.err
    assert not (tmp_path / "c").exists()


def test_other_settings_in_the_same_folder_are_refused(cli, job, tmp_path):
    out = tmp_path / "c"
    assert cli("compare", job, "--out", out, "-o", "federation.rounds=1").code == 0
    done = cli("compare", job, "--out", out)
    assert done.code == 2
    assert "contender 'fedit'" in done.err
    assert "federation.rounds = 1, now 2" in done.err
