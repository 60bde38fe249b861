import csv
import json
import statistics

import pytest

from fedlora.errors import RunFolderError
from fedlora.report.comparison import read_comparison
from fedlora.report.comparison_page import comparison_sentence, write_comparison


def one_run(label, seed, final, kind="strategy", rounds=4, size=100):
    curve = [
        {"round": n, "steps": 10 * n, "value": final * n / rounds, "bytes": size * n}
        for n in range(rounds + 1)
    ]
    return {
        "label": label,
        "kind": kind,
        "seed": seed,
        "curve": curve,
        "final": {"accuracy": final, "loss": 1.0},
        "aggregation_error": 0.1 * seed if kind == "strategy" else None,
        "bytes_up": size,
        "bytes_down": 2 * size,
        "server_s": 1.5,
    }


def write(folder, runs, **changes):
    found = {
        "name": "a <comparison>",
        "metric": "accuracy",
        "machine": {"processor": "a processor"},
        "seeds": [0, 1],
        "rounds": 4,
        "steps_per_client": 40,
        "runs": runs,
    }
    folder.mkdir(exist_ok=True)
    (folder / "comparison.json").write_text(json.dumps({**found, **changes}))
    return folder


@pytest.fixture
def folder(tmp_path):
    runs = [
        one_run("fedit", 0, 0.70),
        one_run("fedit", 1, 0.72),
        one_run("fedex|x", 0, 0.80),
        one_run("fedex|x", 1, 0.84),
        one_run("local", 0, 0.40, "baseline", rounds=1, size=0),
        one_run("base", 0, 0.01, "baseline", rounds=1, size=0),
    ]
    return write(tmp_path / "comparison", runs)


def test_files_are_written(folder, read_page):
    page = read_page(write_comparison(folder))
    assert page.count("svg") == 3
    assert page.table("label")[0]["accuracy, mean"] == "82.00 % ★"
    assert "a <comparison>" in page.text
    assert "fedex|x is best with 82.00 %" in page.text
    assert (folder / "comparison.png").read_bytes().startswith(b"\x89PNG")


def test_the_table_has_mean_and_sample_deviation(folder):
    write_comparison(folder)
    with (folder / "table.csv").open(newline="") as file:
        rows = {row["label"]: row for row in csv.DictReader(file)}
    assert list(rows) == ["fedex|x", "fedit", "local", "base"]
    assert float(rows["fedit"]["mean"]) == pytest.approx(0.71)
    deviation = float(rows["fedit"]["standard deviation"])
    assert deviation == pytest.approx(statistics.stdev([0.70, 0.72]))
    assert rows["fedit"]["seeds"] == "0 1"
    assert float(rows["fedit"]["aggregation error"]) == pytest.approx(0.05)
    assert rows["local"]["standard deviation"] == ""
    assert rows["local"]["aggregation error"] == ""


def test_every_line_of_the_markdown_table_has_as_many_cells(folder):
    write_comparison(folder)
    lines = (folder / "table.md").read_text().splitlines()
    assert {line.replace("\\|", "").count("|") for line in lines} == {10}


def test_a_lead_within_the_spread_is_called_chance(tmp_path):
    near = [one_run("a", 0, 0.5), one_run("a", 1, 0.7), one_run("b", 0, 0.49), one_run("b", 1, 0.6)]
    assert "may be chance" in comparison_sentence(read_comparison(write(tmp_path / "near", near)))
    apart = [one_run("a", 0, 0.5), one_run("a", 1, 0.6), one_run("b", 0, 0.1), one_run("b", 1, 0.2)]
    sentence = comparison_sentence(read_comparison(write(tmp_path / "apart", apart)))
    assert sentence.startswith("a is best")
    assert "no seed of the one reaches a seed of the other" in sentence


def test_lower_is_better_for_loss(tmp_path):
    runs = [one_run("a", 0, 0.5), {**one_run("b", 0, 0.5), "final": {"loss": 0.3}}]
    comparison = read_comparison(write(tmp_path / "loss", runs, metric="loss"))
    assert [entry.label for entry in comparison.entries] == ["b", "a"]


def test_equal_comparisons_give_equal_files(folder, tmp_path):
    runs = json.loads((folder / "comparison.json").read_text())["runs"]
    other = write(tmp_path / "other", runs)
    write_comparison(folder)
    write_comparison(other)
    for name in ("comparison.html", "comparison.png", "table.csv", "table.md"):
        assert (folder / name).read_bytes() == (other / name).read_bytes()


def test_runs_without_curve_or_score_are_drawn(tmp_path, read_page):
    runs = [
        {**one_run("a", 0, 0.5), "curve": []},
        {**one_run("b", 0, 0.5), "curve": [], "final": {}},
    ]
    page = read_page(write_comparison(write(tmp_path / "sparse", runs)))
    assert "a reaches 50.00 % accuracy on one seed." in page.text
    assert read_page(write_comparison(write(tmp_path / "none", []))).count("svg") == 3


def test_nothing_is_fetched_and_labels_are_text(tmp_path, read_page):
    runs = [one_run("<img src=http://x>$a$", 0, 0.5)]
    page = read_page(write_comparison(write(tmp_path / "hostile", runs)))
    assert "img" not in {tag for tag, _ in page.tags}
    for _, attributes in page.tags:
        for name, value in attributes.items():
            assert name not in ("src", "href", "xlink:href") or value.startswith(("#", "data:"))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"metric": "speed"}'])
def test_what_is_no_comparison_is_an_error(tmp_path, text):
    (tmp_path / "comparison.json").write_text(text)
    with pytest.raises(RunFolderError, match=r"comparison\.json"):
        read_comparison(tmp_path)


def test_a_missing_file_is_an_error(tmp_path):
    with pytest.raises(RunFolderError, match=r"comparison\.json"):
        write_comparison(tmp_path)
