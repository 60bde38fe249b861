"""Reads a comparison at three budgets of local work and writes a Markdown table.

    python benchmarks/budgets.py COMPARISON_FOLDER --title "..." --command "..." --out FILE.md

The folder is what `fedlora compare` wrote. Budgets are a quarter, a half and all of the steps
per client; a curve is read at the last evaluation that does not exceed the budget.
"""

import argparse
import json
from pathlib import Path
from statistics import mean
from typing import Any

FRACTIONS = (0.25, 0.5, 1.0)


def read_at(runs: list[dict[str, Any]], steps: float) -> str:
    """Mean over seeds of the value at `steps`; a dash where nothing was evaluated yet."""
    values = []
    for run in runs:
        before = [point["value"] for point in run["curve"] if point["steps"] <= steps]
        # a run that failed or diverged has no score, and an earlier one is not its score
        if run["status"] == "done" and before and before[-1] is not None:
            values.append(before[-1])
    return f"{100 * mean(values):.1f}" if values else "-"


def main() -> None:
    """Writes the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--title", required=True)
    parser.add_argument("--command", required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    found = json.loads((options.folder / "comparison.json").read_text("utf-8"))
    total = found["steps_per_client"]
    budgets = [round(total * fraction) for fraction in FRACTIONS]
    labels = list(dict.fromkeys(run["label"] for run in found["runs"]))
    lines = [
        f"# {options.title}",
        "",
        f"`{options.command}`",
        "",
        f"{found['metric']} in percent on the held-out set after so many local steps per client; "
        f"seeds {', '.join(map(str, found['seeds']))}. Centralised training does the steps of all "
        "clients on all data; local-only is the mean over clients that train alone, evaluated at "
        "the end.",
        "",
        "| | " + " | ".join(f"{budget} steps" for budget in budgets) + " | up | down |",
        "| --- |" + " ---: |" * (len(budgets) + 2),
    ]
    for label in labels:
        runs = [run for run in found["runs"] if run["label"] == label]
        cells = [read_at(runs, budget) for budget in budgets]
        sent = [
            f"{mean(run[key] for run in runs) / 1e6:.0f} MB" for key in ("bytes_up", "bytes_down")
        ]
        if runs[0]["kind"] == "baseline":
            sent = ["", ""]
        lines.append(f"| {label} | " + " | ".join([*cells, *sent]) + " |")
    machine = ", ".join(f"{key} {value}" for key, value in sorted(found["machine"].items()))
    lines += ["", f"Machine: {machine}.", ""]
    options.out.write_text("\n".join(lines), "utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
