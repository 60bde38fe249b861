import csv
import json
import statistics

import pytest
from scipy import stats

from fedlora.errors import RunFolderError
from fedlora.report.comparison import read_comparison
from fedlora.report.comparison_csv import CURVE_COLUMNS, RUN_COLUMNS, SUMMARY_COLUMNS
from fedlora.report.comparison_page import level_sentence, write_comparison


def one_run(label, seed, final, kind="strategy", rounds=4, size=100, skew=None, failed=False):
    values = [] if final is None else [final * n / rounds for n in range(1, rounds + 1)]
    curve = [
        {
            "round": n,
            "steps": 10 * n,
            "value": value,
            "bytes": size * n,
            "scores": {"accuracy": value, "loss": 1.0},
            "aggregation_error": None,
        }
        for n, value in enumerate(values, 1)
    ]
    return {
        "label": label,
        "kind": kind,
        "skew": skew,
        "seed": seed,
        "status": "failed" if failed else "done",
        "reason": "no luck" if failed else None,
        "rounds": rounds,
        "curve": curve,
        "final": {} if failed or final is None else {"accuracy": final, "loss": 1.0},
        "aggregation_error": 0.1 * seed if kind == "strategy" else None,
        "bytes_up": size,
        "bytes_down": 2 * size,
        "server_s": 1.5,
    }


def write(folder, runs, **changes):
    kinds = {run["label"]: run["kind"] for run in runs}
    strategies = [label for label, kind in kinds.items() if kind == "strategy"]
    found = {
        "format": 2,
        "name": "a <comparison>",
        "metric": "accuracy",
        "equal": "rounds",
        "reference": strategies[0] if strategies else None,
        "contenders": [{"label": label, "kind": kind} for label, kind in kinds.items()],
        "levels": list(dict.fromkeys(run["skew"] for run in runs)) or [None],
        "own_test": False,
        "machine": {"processor": "a processor"},
        "seeds": sorted({run["seed"] for run in runs}),
        "rounds": 4,
        "steps_per_client": 40,
        "runs": runs,
    }
    folder.mkdir(exist_ok=True)
    (folder / "comparison.json").write_text(json.dumps({**found, **changes}))
    return folder


RUNS = [
    one_run("fedit", 0, 0.70),
    one_run("fedit", 1, 0.72),
    one_run("fedex|x", 0, 0.80),
    one_run("fedex|x", 1, 0.84),
    one_run("local", 0, 0.40, "baseline", rounds=1, size=0),
    one_run("base", 0, 0.01, "baseline", rounds=1, size=0),
]


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path / "comparison", RUNS)


def rows(folder, name):
    with (folder / name).open(newline="") as file:
        return list(csv.DictReader(file))


def sentence(folder):
    comparison = read_comparison(folder)
    return level_sentence(comparison, comparison.levels[0])


def test_files_are_written(folder, read_page):
    page = read_page(write_comparison(folder))
    assert page.count("svg") == 4
    table = page.table("label")
    assert [row["label"] for row in table] == ["fedit", "fedex|x", "local", "base"]
    assert table[1]["accuracy, mean"] == "82.00 % ★"
    assert table[1]["difference to fedit"] == "+11.00 points"
    assert table[0]["difference to fedit"] == "reference"
    assert "a <comparison>" in page.text
    assert "fedex|x is best with 82.00 %" in page.text
    assert (folder / "comparison.png").read_bytes().startswith(b"\x89PNG")


def test_the_summary_has_mean_deviation_and_paired_difference(folder):
    write_comparison(folder)
    found = {row["label"]: row for row in rows(folder, "summary.csv")}
    assert list(found) == ["fedit", "fedex|x", "local", "base"]
    fedit, fedex = found["fedit"], found["fedex|x"]
    assert tuple(fedit) == SUMMARY_COLUMNS
    assert float(fedit["mean"]) == pytest.approx(0.71)
    assert float(fedit["sd"]) == pytest.approx(statistics.stdev([0.70, 0.72]))
    assert (fedit["n"], fedit["failed"], fedit["difference"]) == ("2", "0", "")
    assert float(fedit["aggregation_error"]) == pytest.approx(0.05)
    test = stats.ttest_rel([0.80, 0.84], [0.70, 0.72])
    low, high = test.confidence_interval(0.95)
    assert float(fedex["difference"]) == pytest.approx(0.11)
    assert float(fedex["se"]) == pytest.approx(stats.sem([0.10, 0.12]))
    assert (float(fedex["ci_low"]), float(fedex["ci_high"])) == pytest.approx((low, high))
    # one seed of the baseline: a difference, but no interval
    assert float(found["local"]["difference"]) == pytest.approx(-0.30)
    assert (found["local"]["sd"], found["local"]["ci_low"], found["local"]["pairs"]) == (
        "",
        "",
        "1",
    )
    assert found["local"]["aggregation_error"] == ""


def test_the_other_csv_files_hold_every_run_and_every_evaluated_round(folder):
    write_comparison(folder)
    runs, curves = rows(folder, "runs.csv"), rows(folder, "curves.csv")
    assert tuple(runs[0]) == RUN_COLUMNS
    assert tuple(curves[0]) == CURVE_COLUMNS
    assert [(r["label"], int(r["seed"])) for r in runs] == [(r["label"], r["seed"]) for r in RUNS]
    # repr reads back as the same number
    assert [float(r["accuracy"]) for r in runs] == [r["final"]["accuracy"] for r in RUNS]
    assert runs[0]["exact_match"] == runs[0]["skew"] == runs[0]["reason"] == ""
    points = [(run["label"], point) for run in RUNS for point in run["curve"]]
    assert len(curves) == len(points) == 4 * 4 + 2
    for row, (label, point) in zip(curves, points, strict=True):
        assert (row["label"], int(row["round"])) == (label, point["round"])
        assert (int(row["bytes"]), float(row["accuracy"])) == (point["bytes"], point["value"])


def test_every_line_of_the_markdown_table_has_as_many_cells(folder):
    write_comparison(folder)
    text = (folder / "table.md").read_text()
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + 4
    assert len({line.replace("\\|", "").count("|") for line in lines}) == 1
    assert "95 % by Student's t" in text


def test_at_equal_bytes_the_dear_one_is_read_early(tmp_path, read_page):
    runs = [
        one_run("cheap", 0, 0.4, size=100),
        one_run("dear", 0, 0.8, size=250),
        one_run("local", 0, 0.3, "baseline", rounds=1, size=0),
    ]
    path = write(tmp_path / "bytes", runs, equal="bytes")
    page = read_page(write_comparison(path))
    found = {row["label"]: row for row in rows(path, "summary.csv")}
    assert {row["budget"] for row in found.values()} == {"400"}
    # 250 bytes at round 1, 500 at round 2
    assert (found["dear"]["first_round"], found["dear"]["last_round"]) == ("1", "1")
    assert float(found["dear"]["mean"]) == pytest.approx(0.2)
    assert float(found["dear"]["difference"]) == pytest.approx(-0.2)
    assert float(found["dear"]["mean_at_equal_rounds"]) == pytest.approx(0.8)
    assert (found["local"]["mean"], found["local"]["last_round"]) == ("", "")
    assert float(found["local"]["mean_at_equal_rounds"]) == pytest.approx(0.3)
    table = {row["label"]: row for row in page.table("label")}
    assert table["dear"]["read at round"] == "1"
    assert table["dear"]["accuracy at round 4"] == "80.00 %"
    assert "400 bytes" in page.text


def test_unequal_numbers_of_rounds_are_read_at_the_shorter(tmp_path):
    runs = [one_run("short", 0, 0.5, rounds=2), one_run("long", 0, 0.8, rounds=4)]
    path = write(tmp_path / "rounds", runs)
    write_comparison(path)
    found = {row["label"]: row for row in rows(path, "summary.csv")}
    assert {row["budget"] for row in found.values()} == {"2"}
    assert float(found["long"]["mean"]) == pytest.approx(0.4)


def test_a_failed_seed_is_in_no_mean_and_is_told(tmp_path, read_page):
    runs = [
        one_run("a", 0, 0.5),
        one_run("a", 1, 0.6),
        one_run("a", 2, 0.7),
        one_run("b", 0, 0.9),
        one_run("b", 1, 0.1, rounds=1, failed=True),
        one_run("b", 2, 0.8),
    ]
    path = write(tmp_path / "failed", runs)
    page = read_page(write_comparison(path))
    found = {row["label"]: row for row in rows(path, "summary.csv")}
    b = found["b"]
    assert float(b["mean"]) == pytest.approx(0.85)
    assert (b["n"], b["failed"], b["pairs"]) == ("2", "1", "2")
    assert float(b["difference"]) == pytest.approx((0.4 + 0.1) / 2)
    # where it stopped does not shorten the others
    assert {row["budget"] for row in found.values()} == {"4"}
    assert page.table("label")[1]["n"] == "2 of 3 (1 failed)"
    assert "b, seed 1 failed and is in no mean: no luck" in page.text
    assert rows(path, "runs.csv")[4]["reason"] == "no luck"


def test_a_diverged_run_is_not_read_where_it_was_still_finite(tmp_path, read_page):
    runs = [one_run("a", 0, 0.5), one_run("b", 0, 0.4), one_run("b", 1, 0.6), one_run("a", 1, 0.5)]
    runs[2]["curve"][-1]["value"] = None
    path = write(tmp_path / "diverged", runs)
    page = read_page(write_comparison(path))
    b = rows(path, "summary.csv")[1]
    assert (b["mean"], b["n"], b["without_score"]) == ("0.4", "1", "1")
    assert "b: 1 of 2 runs have no finite score" in page.text
    level = read_comparison(path).levels[0]
    assert [point.round for point in level.entries[1].curve] == [1, 2, 3]


def test_bands_are_one_sample_deviation(folder):
    point = read_comparison(folder).levels[0].entries[0].curve[-1]
    assert (point.round, point.num_bytes) == (4, 400)
    assert (point.mean, point.deviation) == pytest.approx((0.71, statistics.stdev([0.70, 0.72])))


def test_every_level_has_its_own_table_and_budget(tmp_path, read_page):
    runs = [
        one_run(label, seed, final + 0.01 * seed, skew=skew, size=size)
        for skew, size in ((0.1, 100), (10.0, 120))
        for seed in (0, 1)
        for label, final in (("a", 0.5), ("b", 0.6))
    ]
    path = write(tmp_path / "levels", runs, equal="bytes", own_test=True)
    page = read_page(write_comparison(path))
    assert len([t for t in page.tables if t[0][0] == "label"]) == 2
    assert page.count("svg") == 1 + 2 * 4
    assert [(r["skew"], r["budget"]) for r in rows(path, "summary.csv")] == [
        ("0.1", "400"),
        ("0.1", "400"),
        ("10.0", "480"),
        ("10.0", "480"),
    ]
    assert "Results at alpha 0.1" in page.text
    assert "compare contenders at one level" in page.text
    names = {p.name for p in path.glob("*.png")}
    assert names == {"comparison.png", "comparison-alpha0.1.png", "comparison-alpha10.png"}


def test_a_lead_within_the_interval_is_called_chance(tmp_path):
    near = [one_run("a", 0, 0.5), one_run("a", 1, 0.7), one_run("b", 0, 0.49), one_run("b", 1, 0.6)]
    assert "may be chance" in sentence(write(tmp_path / "near", near))
    apart = [one_run("a", 0, 0.5), one_run("a", 1, 0.6)]
    apart += [one_run("b", 0, 0.1), one_run("b", 1, 0.202)]
    found = sentence(write(tmp_path / "apart", apart))
    assert found.startswith("a is best")
    assert "b differs from a by −39.90 points" in found
    assert "chance" not in found
    one = sentence(write(tmp_path / "one", [apart[0], apart[2]]))
    assert "on one seed, so the order may be chance" in one


def test_one_seed_has_no_interval_and_the_table_says_so(tmp_path, read_page):
    path = write(tmp_path / "one", [one_run("a", 0, 0.5), one_run("b", 0, 0.6)])
    page = read_page(write_comparison(path))
    assert page.table("label")[1]["95 % interval"] == "– (one seed)"
    assert "One seed: no spread and no interval" in page.text
    b = rows(path, "summary.csv")[1]
    assert (b["se"], b["ci_low"], b["ci_high"], b["sd"]) == ("", "", "", "")


def test_lower_is_better_for_loss(tmp_path):
    runs = [one_run("a", 0, 0.5), one_run("b", 0, 0.3)]
    assert sentence(write(tmp_path / "loss", runs, metric="loss")).startswith("b is best")


def test_equal_comparisons_give_equal_files(folder, tmp_path):
    runs = json.loads((folder / "comparison.json").read_text())["runs"]
    other = write(tmp_path / "other", runs)
    write_comparison(folder)
    write_comparison(other)
    for path in folder.iterdir():
        assert path.read_bytes() == (other / path.name).read_bytes()


def test_runs_without_score_are_drawn(tmp_path, read_page):
    runs = [one_run("a", 0, 0.5), one_run("b", 0, None)]
    page = read_page(write_comparison(write(tmp_path / "sparse", runs)))
    assert "a reaches 50.00 % accuracy on one seed." in page.text
    page = read_page(write_comparison(write(tmp_path / "none", [])))
    assert "No strategy has a score yet." in page.text


def test_nothing_is_fetched_and_labels_are_text(tmp_path, read_page):
    runs = [one_run("<img src=http://x>$a$", 0, 0.5)]
    page = read_page(write_comparison(write(tmp_path / "hostile", runs)))
    assert "img" not in {tag for tag, _ in page.tags}
    for _, attributes in page.tags:
        for name, value in attributes.items():
            assert name not in ("src", "href", "xlink:href") or value.startswith(("#", "data:"))


def test_ids_of_pictures_do_not_repeat(tmp_path, read_page):
    runs = [one_run(x, s, 0.5, skew=k) for k in (0.1, 1.0) for s in (0, 1) for x in "ab"]
    page = read_page(write_comparison(write(tmp_path / "ids", runs)))
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"format": 2}', '{"format": 2, "metric": "speed"}']
)
def test_what_is_no_comparison_is_an_error(tmp_path, text):
    (tmp_path / "comparison.json").write_text(text)
    with pytest.raises(RunFolderError, match=r"comparison\.json"):
        read_comparison(tmp_path)


def test_a_missing_file_is_an_error(tmp_path):
    with pytest.raises(RunFolderError, match=r"comparison\.json"):
        write_comparison(tmp_path)
