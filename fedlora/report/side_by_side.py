"""Global and own adapter of every client on the same data, as tables on page and terminal."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table
from rich.text import Text

from fedlora.report.comparison_table import signed
from fedlora.report.headline import MISSING, Metric, headline
from fedlora.report.markup import Cell, Html, element, table, visible
from fedlora.report.natural_order import natural_key
from fedlora.report.run_folder import drawable

MOST_PRINTED = 24
COLUMNS = ("client", "examples", "global adapter", "own adapter", "difference")
WHOSE = {
    "personal": "what the strategy leaves with each client",
    "local": "trained by each client alone",
}


@dataclass(frozen=True)
class SideBySide:
    """One kind of own adapters beside the global one.

    Attributes:
        kind: a key of `WHOSE`.
        metric: what is shown.
        rows: (client, examples, global, own) by name; None where nothing was measured.
    """

    kind: str
    metric: Metric
    rows: Sequence[tuple[str, int, float | None, float | None]]

    @property
    def verdict(self) -> str:
        """For how many clients which one is better, in one sentence."""
        gains = [
            self.metric.gain(own, common)
            for _, _, common, own in self.rows
            if common is not None and own is not None
        ]
        better, worse = (sum(sign * gain > 0 for gain in gains) for sign in (1, -1))
        who = "client" if len(gains) == 1 else "clients"
        return (
            f"The own adapter is better for {better} and worse for {worse} of {len(gains)} {who} "
            "with both scores."
        )

    def lines(self) -> list[tuple[list[str], float | None]]:
        """Cells of every row, and how much better the own adapter is."""
        found = []
        for client, examples, common, own in self.rows:
            gain, difference = None, MISSING
            if common is not None and own is not None:
                gain = self.metric.gain(own, common)
                difference = signed(self.metric, own - common)
            scores = [self.metric.format(common), self.metric.format(own)]
            found.append(([client, str(examples), *scores, difference], gain))
        return found


def side_by_side(summary: Mapping[str, Any], task: str) -> list[SideBySide]:
    """What `summary` has of it; nothing where clients have no adapters of their own.

    Args:
        summary: as in summary.json.
        task: `model.task` of the job.
    """
    found = summary.get("side_by_side") or {}
    tables = []
    for kind in WHOSE:
        rows = sorted(found.get(kind) or [], key=lambda row: natural_key(str(row["client"])))
        if rows:
            metric = headline(task, next((row["global"] for row in rows if row["global"]), None))
            tables.append(SideBySide(kind, metric, [_row(row, metric) for row in rows]))
    return tables


def _row(row: Mapping[str, Any], metric: Metric) -> tuple[str, int, float | None, float | None]:
    common, own = (drawable(row[which].get(metric.key)) for which in ("global", "own"))
    return str(row["client"]), int(row["examples"]), common, own


def page_table(found: SideBySide) -> Html:
    """The table of a page; what is better is green, what is worse red."""
    lines: list[list[Cell]] = []
    for cells, gain in found.lines():
        css = "" if not gain else "good" if gain > 0 else "bad"
        lines.append([*cells[:-1], element("span", cells[-1], css=css)])
    return table(COLUMNS, lines, numeric=range(1, len(COLUMNS)))


def text_table(found: SideBySide) -> Table:
    """The table of the terminal, cut off after the first clients."""
    lines = found.lines()
    more = len(lines) - MOST_PRINTED
    title = f"own data, {found.metric.name}: {WHOSE[found.kind]}"
    caption = found.verdict + (f" {more} more clients are in the report." if more > 0 else "")
    made = Table(title=title, caption=caption, title_justify="left", caption_justify="left")
    for place, column in enumerate(COLUMNS):
        made.add_column(column, justify="right" if place else "left", no_wrap=place > 0)
    for cells, _ in lines[:MOST_PRINTED]:
        made.add_row(*(Text(visible(cell)) for cell in cells))
    return made
