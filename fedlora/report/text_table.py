"""The result as a table for the terminal."""

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from fedlora.report.held_out import columns, held_out_rows


def result_table(summary: Mapping[str, Any], task: str) -> Table:
    """Base, local-only, federated and centralised on the held-out set.

    The best of each column is bold and has a star, so that it shows without colours too.

    Args:
        summary: as in summary.json; baselines may be missing.
        task: `model.task` of the job.
    """
    rows = held_out_rows(summary)
    metrics = columns(task, rows)
    table = Table(title="held-out scores", caption="* best", title_justify="left")
    table.add_column("model")
    for metric in metrics:
        table.add_column(metric.name, justify="right", no_wrap=True)
    best = {m.key: m.best([row.scores.get(m.key) for row in rows]) for m in metrics}
    for i, row in enumerate(rows):
        cells = []
        for metric in metrics:
            text = metric.format(row.scores.get(metric.key))
            cells.append(f"[bold]{text} *[/bold]" if i in best[metric.key] else f"{text}  ")
        table.add_row(row.name, *cells)
    return table
