import io
import subprocess
import sys

from rich.console import Console

from fedlora.report.text_table import result_table


def printed(summary, task):
    out = io.StringIO()
    Console(file=out, width=120, color_system=None).print(result_table(summary, task))
    return [line.strip("│┃ ") for line in out.getvalue().splitlines()]


def test_all_models_are_listed_and_the_best_is_marked(summary):
    lines = printed(summary, "causal-lm")
    rows = {line.split("│")[0].strip(): line for line in lines if "│" in line}
    assert list(rows) == ["base model", "local-only (mean)", "federated", "centralised"]
    assert rows["centralised"].count("*") == 4  # accuracy and perplexity tie
    assert "1.4000 *" in rows["centralised"]
    assert "1.5000 *" not in rows["federated"]


def test_a_summary_without_baselines_has_two_rows(summary):
    del summary["baselines"]
    rows = [line for line in printed(summary, "causal-lm") if "│" in line]
    assert [row.split("│")[0].strip() for row in rows] == ["base model", "federated"]
    assert "1.5000 *" in rows[1]


def test_classification_leads_with_accuracy():
    found = {"base": {"accuracy": 0.1, "loss": 3.0}, "global": {"accuracy": 0.9, "loss": 1.0}}
    header = next(line for line in printed(found, "sequence-classification") if "model" in line)
    assert header.index("accuracy") < header.index("loss")


def test_partial_summary_is_no_error():
    result_table({"base": {}, "global": {}, "baselines": {"local": {}}}, "causal-lm")
    result_table({"base": {"loss": 1.0}, "baselines": None}, "causal-lm")


def test_importing_the_entry_points_leaves_matplotlib_and_torch_alone():
    code = (
        "import sys, fedlora.report.text_table, fedlora.report.run_page,"
        " fedlora.report.comparison_page\n"
        "assert not {'matplotlib', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
