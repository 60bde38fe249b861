"""Curves of a comparison: score by round and by traffic, at one level of skew."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from fedlora.report.comparison import Comparison, Entry, Level, Point
from fedlora.report.comparison_style import (
    LONGEST_LABEL,
    Look,
    Window,
    legend_below,
    looks,
    percent_axis,
    score_title,
    score_window,
)
from fedlora.report.markup import format_bytes, visible
from fedlora.report.theme import themed, whole_numbers

MOST_MARKED = 30


@themed
def curves_figure(comparison: Comparison, level: Level) -> Figure:
    """Mean over seeds with a band of one standard deviation, by round and by traffic."""
    figure = Figure(figsize=(10.4, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    _by_round(left, comparison, level)
    _by_traffic(right, comparison, level)
    legend_below(figure, left, columns=4)
    return figure


@themed
def by_round_figure(comparison: Comparison, level: Level) -> Figure:
    """The score by round alone."""
    figure = Figure(figsize=(4.9, 4.3), layout="constrained")
    axes = figure.add_subplot()
    _by_round(axes, comparison, level)
    legend_below(figure, axes, columns=2)
    return figure


@themed
def by_traffic_figure(comparison: Comparison, level: Level) -> Figure:
    """The score by bytes alone."""
    figure = Figure(figsize=(4.9, 4.3), layout="constrained")
    axes = figure.add_subplot()
    _by_traffic(axes, comparison, level)
    legend_below(figure, axes, columns=2)
    return figure


def _by_round(axes: Axes, comparison: Comparison, level: Level) -> None:
    axes.set_title(score_title(comparison.metric))
    axes.set_xlabel("round")
    _draw_all(axes, comparison, level, [[p.round for p in entry.curve] for entry in level.entries])
    last = max((p.round for entry in level.entries for p in entry.curve), default=1)
    axes.set_xlim(0, 1.03 * max(last, 1))
    whole_numbers(axes.xaxis)


def _by_traffic(axes: Axes, comparison: Comparison, level: Level) -> None:
    axes.set_title("the same, by bytes sent and received")
    axes.set_xlabel("bytes up and down, all clients together")
    sizes = [[point.num_bytes for point in entry.curve] for entry in level.entries]
    # a baseline that sends nothing has no place on this axis but its final score
    _draw_all(axes, comparison, level, [places if any(places) else [] for places in sizes])
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: format_bytes(value)))


def _draw_all(
    axes: Axes, comparison: Comparison, level: Level, places: Sequence[Sequence[float]]
) -> None:
    later = [
        value
        for entry in level.strategies
        for point in entry.curve[len(entry.curve) // 4 :]
        for value in _band(point)
    ]
    window = score_window(level, later)
    look = looks(comparison)
    for entry, where in zip(level.entries, places, strict=True):
        _draw(axes, comparison, entry, where, window, look[entry.label])
    if window:
        axes.set_ylim(window)
    percent_axis(axes.yaxis, comparison.metric)


def _draw(
    axes: Axes,
    comparison: Comparison,
    entry: Entry,
    places: Sequence[float],
    window: Window | None,
    look: Look,
) -> None:
    label = visible(entry.label, LONGEST_LABEL)
    means = [point.mean for point in entry.curve]
    if not means:
        return
    if len(places) < 2 and (entry.kind == "baseline" or not places):
        if window and not window[0] <= means[-1] <= window[1]:
            label += f" ({comparison.metric.format(means[-1])}, off the axis)"
        axes.axhline(means[-1], color=look.colour, linestyle=look.line, linewidth=1.6, label=label)
        return
    marker = look.marker if len(places) <= MOST_MARKED else ""
    axes.plot(
        places,
        means,
        color=look.colour,
        linestyle=look.line,
        marker=marker,
        markersize=4,
        label=label,
    )
    if entry.curve[0].deviation is not None:
        lows, highs = zip(*map(_band, entry.curve), strict=True)
        axes.fill_between(places, lows, highs, color=look.colour, alpha=0.1, linewidth=0)
        # where bands cover each other their edges still tell them apart
        for edge in (lows, highs):
            axes.plot(places, edge, color=look.colour, linewidth=0.7, alpha=0.6)


def _band(point: Point) -> tuple[float, float]:
    deviation = point.deviation or 0.0
    return point.mean - deviation, point.mean + deviation
