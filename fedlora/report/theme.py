"""How pictures look, and how they become SVG or PNG, without pyplot's global figures."""

import functools
import html
import io
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ParamSpec

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from fedlora.report.markup import Html

P = ParamSpec("P")

INK = "#1f2430"
MUTED = "#5f6878"
GRID = "#dfe3ea"
FEDERATED = "#3b6fd9"
BASE = MUTED
LOCAL = "#e0862c"
CENTRALISED = "#2a9d6f"
# middle tones: readable on white and on black
CATEGORIES = (
    "#4c78c8",
    "#e58a35",
    "#3fa37a",
    "#d0576b",
    "#8f6bc2",
    "#bd9f2f",
    "#4ba9c4",
    "#b5713f",
    "#d884b8",
    "#7d8896",
)

# in a page these follow the reader's light or dark setting
_VARIABLES = {INK: "var(--ink)", MUTED: "var(--muted)", GRID: "var(--grid)"}

_STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "text.color": INK,
    # names are data: a dollar sign must not start a formula
    "text.parse_math": False,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "lines.linewidth": 2.0,
    "lines.markersize": 4.5,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "svg.fonttype": "none",
}


@contextmanager
def _drawing(**settings: Any) -> Iterator[None]:
    # "default" first: a user's own matplotlibrc must not change a report
    with matplotlib.style.context(["default", {**_STYLE, **settings}]), warnings.catch_warnings():
        # the browser has fonts for what the layout's font lacks
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


def themed(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    """Runs a drawing function under the report's style."""

    @functools.wraps(draw)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> Figure:
        with _drawing():
            return draw(*args, **kwargs)

    return drawn


def to_svg(figure: Figure, name: str, description: str) -> Html:
    """The figure as an inline SVG element that takes its colours from the page.

    Args:
        name: unique on the page; ids inside the picture derive from it.
        description: read aloud in place of the picture.
    """
    buffer = io.StringIO()
    with _drawing(**{"svg.hashsalt": name}):
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    text = buffer.getvalue()
    opening, rest = text[text.index("<svg") :].split(">", 1)
    box = re.search(r'viewBox="([\d. -]+)"', opening)
    assert box is not None
    # only ids that something refers to are needed, and the others repeat between pictures
    rest = re.sub(r'<g id="[^"]*"', "<g", rest)
    rest = re.sub(r"\n\s*", "\n", rest)
    for colour, variable in _VARIABLES.items():
        rest = re.sub(rf"((?:fill|stroke): ){colour}", rf"\1{variable}", rest)
    label = html.escape(description)
    return Html(f'<svg viewBox="{box[1]}" role="img" aria-label="{label}">{rest.rstrip()}')


def to_png(figure: Figure) -> bytes:
    """The figure as a PNG file on white."""
    buffer = io.BytesIO()
    with _drawing():
        figure.savefig(
            buffer, format="png", dpi=160, facecolor="white", metadata={"Software": None}
        )
    return buffer.getvalue()


def whole_numbers(axis: Axis) -> None:
    """Ticks at integers only."""
    axis.set_major_locator(MaxNLocator(nbins=8, integer=True, min_n_ticks=1))


def logarithmic(axes: Axes) -> None:
    """A logarithmic y axis whose ticks are plain text (formulas are off)."""
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def legend_above(axes: Axes, columns: int = 4) -> None:
    """A legend between title and plot, where it cannot cover a line."""
    handles, labels = axes.get_legend_handles_labels()
    if not handles:
        return
    axes.legend(
        handles,
        labels,
        loc="lower left",
        bbox_to_anchor=(-0.02, 1.0),
        ncols=min(columns, len(handles)),
        borderaxespad=0.2,
        handlelength=1.5,
        columnspacing=1.2,
        labelcolor=INK,
    )
