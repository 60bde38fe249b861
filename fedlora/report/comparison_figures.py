"""Pictures of a comparison: score by round, score by traffic, and final scores by seed."""

import statistics
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from fedlora.report.comparison import Comparison, Entry
from fedlora.report.headline import Metric
from fedlora.report.markup import format_bytes, visible
from fedlora.report.theme import CATEGORIES, INK, MUTED, themed, whole_numbers

MOST_MARKED = 30

Window = tuple[float, float]


@themed
def curves_figure(comparison: Comparison) -> Figure:
    """Mean over seeds with a band from the worst to the best, by round and by traffic."""
    figure = Figure(figsize=(10.4, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    _by_round(left, comparison)
    _by_traffic(right, comparison)
    _legend(figure, left, columns=5)
    return figure


@themed
def by_round_figure(comparison: Comparison) -> Figure:
    """The score by round alone."""
    figure = Figure(figsize=(4.9, 4.3), layout="constrained")
    axes = figure.add_subplot()
    _by_round(axes, comparison)
    _legend(figure, axes, columns=3)
    return figure


@themed
def by_traffic_figure(comparison: Comparison) -> Figure:
    """The score by bytes alone."""
    figure = Figure(figsize=(4.9, 4.3), layout="constrained")
    axes = figure.add_subplot()
    _by_traffic(axes, comparison)
    _legend(figure, axes, columns=3)
    return figure


@themed
def finals_figure(comparison: Comparison) -> Figure:
    """The final score of every seed as a dot, their mean as a line."""
    entries = [entry for entry in comparison.entries if entry.finals]
    figure = Figure(figsize=(9.6, 1.2 + 0.36 * len(entries)), layout="constrained")
    axes = figure.add_subplot()
    colours = _colours(comparison)
    window = _window(comparison, [v for e in comparison.strategies for v in e.finals])
    for place, entry in enumerate(entries):
        colour = colours[entry.label]
        mean = statistics.fmean(entry.finals)
        if window and not window[0] <= mean <= window[1]:
            below = mean < window[0]
            text = comparison.metric.format(mean)
            axes.annotate(
                f"← {text}" if below else f"{text} →",
                (0.005 if below else 0.995, place),
                xycoords=("axes fraction", "data"),
                ha="left" if below else "right",
                va="center",
                color=MUTED,
            )
            continue
        axes.plot(
            [min(entry.finals), max(entry.finals)],
            [place, place],
            color=colour,
            linewidth=5,
            alpha=0.25,
            solid_capstyle="round",
        )
        axes.plot(entry.finals, [place] * len(entry.finals), "o", color=colour, alpha=0.75)
        axes.plot([mean], [place], "|", color=INK, markersize=15, markeredgewidth=2)
    names = [visible(entry.label, 32) for entry in entries]
    axes.set_yticks(range(len(entries)), names)
    axes.set_ylim(len(entries) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0, labelcolor=INK)
    axes.grid(visible=False, axis="y")
    if window:
        axes.set_xlim(window)
    _percent(axes.xaxis, comparison.metric)
    axes.set_title(f"Final {comparison.metric.name} of each seed, and the mean")
    return figure


def _by_round(axes: Axes, comparison: Comparison) -> None:
    axes.set_title(_title(comparison.metric))
    axes.set_xlabel("round")
    _draw_all(axes, comparison, [[p.round for p in entry.curve] for entry in comparison.entries])
    last = max((p.round for entry in comparison.entries for p in entry.curve), default=1)
    axes.set_xlim(0, 1.03 * max(last, 1))
    whole_numbers(axes.xaxis)


def _by_traffic(axes: Axes, comparison: Comparison) -> None:
    axes.set_title("the same, by bytes sent and received")
    axes.set_xlabel("bytes up and down, all clients together")
    sizes = [[point.num_bytes for point in entry.curve] for entry in comparison.entries]
    # a baseline that sends nothing has no place on this axis but its final score
    _draw_all(axes, comparison, [places if any(places) else [] for places in sizes])
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: format_bytes(value)))


def _draw_all(axes: Axes, comparison: Comparison, places: Sequence[Sequence[float]]) -> None:
    later = [
        value
        for entry in comparison.strategies
        for point in entry.curve[len(entry.curve) // 4 :]
        for value in (point.low, point.high)
    ]
    window = _window(comparison, [*later, *(v for e in comparison.strategies for v in e.finals)])
    for entry, where in zip(comparison.entries, places, strict=True):
        _draw(axes, comparison, entry, where, window)
    if window:
        axes.set_ylim(window)
    _percent(axes.yaxis, comparison.metric)


def _draw(
    axes: Axes,
    comparison: Comparison,
    entry: Entry,
    places: Sequence[float],
    window: Window | None,
) -> None:
    colour = _colours(comparison)[entry.label]
    label = visible(entry.label, 28)
    dashed = entry.kind == "baseline"
    style = "--" if dashed else "-"
    if len(places) < 2:
        if (mean := entry.mean) is not None:
            if window and not window[0] <= mean <= window[1]:
                label += f" ({comparison.metric.format(mean)}, off the axis)"
            axes.axhline(mean, color=colour, linestyle=style, linewidth=1.6, label=label)
        return
    marker = "o" if len(places) <= MOST_MARKED and not dashed else ""
    means = [point.mean for point in entry.curve]
    axes.plot(
        places, means, color=colour, linestyle=style, marker=marker, markersize=3.5, label=label
    )
    if len(entry.seeds) > 1:
        lows, highs = ([getattr(p, side) for p in entry.curve] for side in ("low", "high"))
        axes.fill_between(places, lows, highs, color=colour, alpha=0.18, linewidth=0)


def _window(comparison: Comparison, values: Sequence[float]) -> Window | None:
    """The part of the score axis where strategies differ; None to show all of it.

    A baseline far away would press all strategies into one line.
    """
    finals = [v for entry in comparison.entries for v in entry.finals]
    starts = [entry.curve[0].mean for entry in comparison.entries if entry.curve]
    everything = [*finals, *starts, *values]
    low, high = min(values, default=0.0), max(values, default=0.0)
    if low == high or high - low > 0.4 * (max(everything) - min(everything)):
        return None
    # what is near, such as training on all data together, stays in the picture
    near = [v for v in finals if low - (high - low) <= v <= high + (high - low)]
    low, high = min([low, *near]), max([high, *near])
    return low - 0.07 * (high - low), high + 0.07 * (high - low)


def _colours(comparison: Comparison) -> Mapping[str, str]:
    # by name, so that a strategy keeps its colour when another one overtakes it
    strategies = sorted(e.label for e in comparison.entries if e.kind != "baseline")
    baselines = sorted(e.label for e in comparison.entries if e.kind == "baseline")
    greys = (MUTED, "#8a93a3", "#a98f6f", "#6f8f86")
    return {
        **{label: CATEGORIES[i % len(CATEGORIES)] for i, label in enumerate(strategies)},
        **{label: greys[i % len(greys)] for i, label in enumerate(baselines)},
    }


def _legend(figure: Figure, axes: Axes, columns: int) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        figure.legend(
            handles,
            labels,
            loc="outside lower center",
            ncols=min(columns, len(handles)),
            labelcolor=INK,
        )


def _title(metric: Metric) -> str:
    return f"Held-out {metric.name} ({'higher' if metric.higher_better else 'lower'} is better)"


def _percent(axis: Axis, metric: Metric) -> None:
    if metric.percent:
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))
