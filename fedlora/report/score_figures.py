"""Scores of a comparison as dots: every seed, paired differences, and score by skew."""

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from fedlora.report.comparison import Comparison, Entry, Level, skew_text
from fedlora.report.comparison_style import (
    LONGEST_LABEL,
    legend_below,
    looks,
    percent_axis,
    score_title,
    score_window,
)
from fedlora.report.markup import visible
from fedlora.report.theme import INK, MUTED, themed

# how far apart contenders stand at one level, as a part of the way to the next level
DODGE = 0.35


@themed
def scores_figure(comparison: Comparison, level: Level) -> Figure:
    """The score of every seed as a dot, their mean as a line."""
    entries = [entry for entry in level.entries if entry.values]
    figure, axes = _rows([visible(entry.label, LONGEST_LABEL) for entry in entries])
    look = looks(comparison)
    window = score_window(level, [v for e in level.strategies for v in e.values.values()])
    for place, entry in enumerate(entries):
        colour, values = look[entry.label].colour, list(entry.values.values())
        mean = entry.mean
        assert mean is not None
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
        ends = [min(values), max(values)]
        axes.plot(ends, [place, place], color=colour, linewidth=5, alpha=0.25)
        axes.plot(values, [place] * len(values), "o", color=colour, alpha=0.75)
        axes.plot([mean], [place], "|", color=INK, markersize=15, markeredgewidth=2)
    if window:
        axes.set_xlim(window)
    percent_axis(axes.xaxis, comparison.metric)
    axes.set_title(f"{score_title(comparison.metric)}: every seed, and the mean")
    return figure


@themed
def differences_figure(comparison: Comparison, level: Level) -> Figure:
    """The mean paired difference to the reference as a dot, its 95 % interval as a line."""
    metric = comparison.metric
    found = [(entry, entry.difference) for entry in level.entries if entry.difference]
    figure, axes = _rows([_with_pairs(entry) for entry, _ in found])
    look = looks(comparison)
    axes.axvline(0, color=MUTED, linewidth=1.2, linestyle="--")
    for place, (entry, difference) in enumerate(found):
        style = look[entry.label]
        if difference.low is not None and difference.high is not None:
            ends = [difference.low, difference.high]
            axes.plot(ends, [place, place], color=style.colour, linewidth=2.4)
            axes.plot(ends, [place, place], "|", color=style.colour, markersize=10)
        marker = style.marker or "o"
        axes.plot([difference.mean], [place], marker, color=style.colour, markersize=7)
    percent_axis(axes.xaxis, metric, unit="")
    axes.set_xlabel(f"{metric.name} difference{', points' if metric.percent else ''}")
    reference = visible(comparison.reference, LONGEST_LABEL)
    right = "right of the line is better" if metric.higher_better else "left of the line is better"
    axes.set_title(f"Difference to {reference}, paired by seed ({right})")
    return figure


@themed
def skew_figure(comparison: Comparison) -> Figure:
    """The mean score at every level of skew, with bars of one standard deviation."""
    figure = Figure(figsize=(9.6, 4.8), layout="constrained")
    axes = figure.add_subplot()
    levels = sorted(comparison.levels, key=lambda level: level.skew or 0.0)
    look = looks(comparison)
    scored = {e.label for level in levels for e in level.entries if e.values}
    labels = [label for label in look if label in scored]
    for number, label in enumerate(labels):
        places, means, bars = [], [], []
        for position, level in enumerate(levels):
            entry = next(e for e in level.entries if e.label == label)
            if entry.mean is not None:
                aside = (2 * number - len(labels) + 1) / len(labels)
                places.append(position + DODGE * aside)
                means.append(entry.mean)
                bars.append(entry.spread.deviation or 0.0)
        style = look[label]
        axes.errorbar(
            places,
            means,
            yerr=bars,
            color=style.colour,
            linestyle="none",
            marker=style.marker or "_",
            markersize=6 if style.marker else 11,
            capsize=3,
            elinewidth=1.6,
            label=visible(label, LONGEST_LABEL),
        )
    _levels_axis(axes, [skew_text(level.skew or 0.0) for level in levels])
    percent_axis(axes.yaxis, comparison.metric)
    axes.set_title(f"{score_title(comparison.metric)} by skew")
    legend_below(figure, axes, columns=4)
    return figure


def _levels_axis(axes: Axes, names: list[str]) -> None:
    axes.set_xlim(-0.5, len(names) - 0.5)
    axes.xaxis.set_major_locator(FixedLocator(range(len(names))))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda _, place: names[place or 0]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("Dirichlet alpha (left: more skew)")
    axes.grid(visible=False, axis="x")
    for place in range(1, len(names)):
        axes.axvline(place - 0.5, color=axes.spines["left"].get_edgecolor(), linewidth=0.8)


def _with_pairs(entry: Entry) -> str:
    assert entry.difference is not None
    name = visible(entry.label, LONGEST_LABEL)
    return f"{name} (n = {entry.difference.count})"


def _rows(names: list[str]) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(9.6, 1.3 + 0.36 * len(names)), layout="constrained")
    axes = figure.add_subplot()
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0, labelcolor=INK)
    axes.grid(visible=False, axis="y")
    return figure, axes
