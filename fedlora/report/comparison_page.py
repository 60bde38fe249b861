"""comparison.html, .png and table.csv, .md: strategies and baselines side by side."""

import csv
import io
from pathlib import Path

from fedlora.report.comparison import Comparison, Entry, read_comparison
from fedlora.report.headline import MISSING
from fedlora.report.markup import Cell, Html, element, format_bytes, section, table, visible
from fedlora.report.page import figure, figures, page
from fedlora.report.run_tables import facts_table
from fedlora.storage import write_atomic

COLUMNS = (
    "label",
    "kind",
    "seeds",
    "mean",
    "standard deviation",
    "aggregation error",
    "bytes up",
    "bytes down",
    "server seconds",
)


def write_comparison(folder: Path) -> Path:
    """Writes comparison.html, comparison.png, table.csv and table.md into `folder`.

    Returns:
        the path of the page.

    Raises:
        RunFolderError: comparison.json is missing or is not a comparison.
        StorageError: the disk refused.
    """
    # matplotlib takes a second to import, which a command without a report must not pay
    from fedlora.report.comparison_figures import curves_figure
    from fedlora.report.theme import to_png

    comparison = read_comparison(folder)
    path = folder / "comparison.html"
    files = {
        "comparison.png": to_png(curves_figure(comparison)),
        "table.csv": table_csv(comparison).encode("utf-8", errors="backslashreplace"),
        "table.md": table_markdown(comparison).encode("utf-8", errors="backslashreplace"),
        path.name: comparison_page(comparison).encode("utf-8", errors="backslashreplace"),
    }
    for name, data in files.items():
        write_atomic(folder / name, data)
    return path


def table_csv(comparison: Comparison) -> str:
    """The table with full precision; unknown values are empty."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(COLUMNS)
    for entry in comparison.entries:
        values = (
            entry.mean,
            entry.deviation,
            entry.aggregation_error,
            entry.bytes_up,
            entry.bytes_down,
            entry.server_s,
        )
        numbers = ["" if value is None else f"{value:.10g}" for value in values]
        writer.writerow([entry.label, entry.kind, " ".join(map(str, entry.seeds)), *numbers])
    return buffer.getvalue()


def table_markdown(comparison: Comparison) -> str:
    """The table as a reader wants it."""
    right = "|".join(["---", "---", "---", *["---:"] * (len(COLUMNS) - 3)])
    lines = [f"| {' | '.join(COLUMNS)} |", f"|{right}|"]
    for entry in comparison.entries:
        cells = (visible(cell).replace("|", "\\|") for cell in _cells(comparison, entry))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def comparison_page(comparison: Comparison) -> str:
    """The page; equal comparisons give equal text."""
    from fedlora.report.comparison_figures import (
        by_round_figure,
        by_traffic_figure,
        finals_figure,
    )
    from fedlora.report.theme import to_svg

    name = comparison.metric.name
    rounds = to_svg(by_round_figure(comparison), "by-round", f"{name} by round")
    traffic = to_svg(by_traffic_figure(comparison), "by-traffic", f"{name} by bytes")
    finals = to_svg(finals_figure(comparison), "finals", f"final {name} of each seed")
    seeds = ", ".join(map(str, comparison.seeds))
    setting = (
        f"{comparison.rounds} rounds · {comparison.steps_per_client} steps per client · "
        f"seeds {seeds}"
    )
    parts = [
        element("p", comparison_sentence(comparison), css="lead"),
        element("p", setting, css="muted"),
        section(
            "Rounds and traffic",
            figures([figure(rounds), figure(traffic)]),
            element(
                "p",
                "Lines are means over seeds, bands reach from the worst to the best seed, "
                "baselines are dashed.",
                css="muted",
            ),
        ),
        section("Final scores", figure(finals, broad=True), _table(comparison)),
        section("Machine", facts_table(comparison.machine)) if comparison.machine else Html(""),
    ]
    return page(visible(comparison.name, 80), *parts)


def comparison_sentence(comparison: Comparison) -> str:
    """Which strategy is best, and whether its lead is more than the spread over seeds."""
    metric, ranked = comparison.metric, comparison.strategies
    if not ranked:
        return "No strategy has a score yet."
    best = ranked[0]
    assert best.mean is not None
    spread = f" ± {metric.format_difference(best.deviation)}" if best.deviation is not None else ""
    score = f"{metric.format(best.mean)}{spread} {metric.name}"
    over = f"over {len(best.finals)} seeds" if len(best.finals) > 1 else "on one seed"
    sentence = f"{best.label} is best with {score} {over}"
    if len(ranked) == 1:
        return f"{best.label} reaches {score} {over}."
    second = ranked[1]
    assert second.mean is not None
    lead = metric.format_difference(best.mean - second.mean)
    sentence += f", {lead} ahead of {second.label}"
    if len(best.finals) > 1 and len(second.finals) > 1:
        apart = min(best.finals) > max(second.finals) or max(best.finals) < min(second.finals)
        sentence += (
            "; no seed of the one reaches a seed of the other"
            if apart
            else "; their seeds overlap, so the order may be chance"
        )
    return sentence + "."


def _table(comparison: Comparison) -> Html:
    ranked = comparison.metric.best([entry.mean for entry in comparison.entries])
    lines: list[list[Cell]] = []
    for i, entry in enumerate(comparison.entries):
        cells: list[Cell] = list(_cells(comparison, entry))
        if i in ranked:
            cells[3] = element("span", f"{cells[3]} ★", css="best")
        lines.append(cells)
    header = [*COLUMNS]
    header[3] = f"{comparison.metric.name}, mean"
    return table(header, lines, numeric=range(3, len(header)))


def _cells(comparison: Comparison, entry: Entry) -> list[str]:
    metric, error = comparison.metric, entry.aggregation_error
    deviation = MISSING if entry.deviation is None else metric.format_difference(entry.deviation)
    return [
        entry.label,
        entry.kind,
        ", ".join(map(str, entry.seeds)),
        metric.format(entry.mean),
        deviation,
        MISSING if error is None else f"{error:.3g}",
        MISSING if entry.bytes_up is None else format_bytes(entry.bytes_up),
        MISSING if entry.bytes_down is None else format_bytes(entry.bytes_down),
        MISSING if entry.server_s is None else f"{entry.server_s:.2f}",
    ]
