"""Pictures of one run over its rounds."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from fedlora.report.headline import Metric
from fedlora.report.held_out import baseline
from fedlora.report.markup import format_bytes
from fedlora.report.run_folder import RunRecord, drawable
from fedlora.report.theme import (
    BASE,
    CENTRALISED,
    FEDERATED,
    LOCAL,
    MUTED,
    legend_above,
    logarithmic,
    themed,
    whole_numbers,
)

SIZE = (4.7, 3.1)
MOST_BARS = 40

Series = tuple[list[int], list[float]]


@themed
def headline_figure(run: RunRecord, metric: Metric) -> Figure:
    """The held-out score of every evaluated round, with the models it is compared to."""
    figure, axes = _axes(run, f"Held-out {metric.name}", legend=True)
    summary = run.scores
    _reference(axes, metric, summary.get("base"), "base", BASE, "--")
    _reference(axes, metric, baseline(summary, "local").get("mean"), "local-only", LOCAL, "--")
    start = (run.start.get("eval") or {}).get(metric.key)
    centralised = baseline(summary, "centralised")
    rounds = centralised.get("rounds") or []
    pooled = series(
        [(0, start), *((e["round"], (e.get("eval") or {}).get(metric.key)) for e in rounds)]
    )
    if len(pooled[0]) > 1:
        axes.plot(*pooled, color=CENTRALISED, linestyle="-.", linewidth=1.6, label="centralised")
    else:
        final = centralised.get("final")
        _reference(axes, metric, final, "centralised", CENTRALISED, "-.")
    scored = [(event["round"], (event.get("eval") or {}).get(metric.key)) for event in run.rounds]
    _line(axes, series([(0, start), *scored]), "federated")
    if metric.percent:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))
    legend_above(axes)
    return figure


@themed
def training_loss_figure(run: RunRecord) -> Figure:
    """The clients' mean training loss of every round."""
    figure, axes = _axes(run, "Training loss")
    points = series([(event["round"], event.get("train_loss")) for event in run.rounds])
    _line(axes, points, "mean of the clients")
    if points[1] and min(points[1]) > 0 and max(points[1]) > 50 * min(points[1]):
        logarithmic(axes)
    return figure


@themed
def traffic_figure(run: RunRecord) -> Figure:
    """Bytes that the clients sent and received in every round."""
    figure, axes = _axes(run, "Bytes per round", legend=True)
    directions = (("up", "bytes_up", FEDERATED), ("down", "bytes_down", LOCAL))
    for i, (label, key, colour) in enumerate(directions):
        rounds, counts = series([(event["round"], event.get(key)) for event in run.rounds])
        if len(rounds) > MOST_BARS:
            axes.plot(rounds, counts, color=colour, label=label)
        else:
            places = [number + (i - 0.5) * 0.38 for number in rounds]
            axes.bar(places, counts, width=0.36, color=colour, label=label)
    axes.set_ylim(bottom=0)
    axes.grid(visible=False, axis="x")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: format_bytes(value)))
    legend_above(axes)
    return figure


@themed
def aggregation_error_figure(run: RunRecord) -> Figure:
    """The relative aggregation error of every round in which it is a number."""
    figure, axes = _axes(run, "Aggregation error")
    points = series([(event["round"], event.get("aggregation_error")) for event in run.rounds])
    _line(axes, points, "aggregation error")
    positive = [value for value in points[1] if value > 0]
    if positive and len(positive) == len(points[1]) and max(positive) > 50 * min(positive):
        logarithmic(axes)
    else:
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
    return figure


def series(points: Sequence[tuple[Any, Any]]) -> Series:
    """Those (round, value) pairs whose value can be drawn."""
    kept = [(int(number), drawable(value)) for number, value in points]
    found = [(number, value) for number, value in kept if value is not None]
    return [number for number, _ in found], [value for _, value in found]


def _axes(run: RunRecord, title: str, *, legend: bool = False) -> tuple[Figure, Axes]:
    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, pad=24 if legend else 8)
    axes.set_xlabel("round")
    last = max(run.last_round, run.num_planned, 1)
    axes.set_xlim(-0.02 * last, last + max(0.5, 0.02 * last))
    whole_numbers(axes.xaxis)
    for event in run.of("resume"):
        axes.axvline(
            int(event["round"]) + 0.5, color=MUTED, linewidth=1.2, linestyle=":", alpha=0.7
        )
    return figure, axes


def _line(axes: Axes, points: Series, label: str) -> None:
    # markers would merge into a thick line on long runs
    marker = "o" if len(points[0]) <= 60 else ""
    axes.plot(*points, color=FEDERATED, marker=marker, label=label)


def _reference(
    axes: Axes,
    metric: Metric,
    scores: Mapping[str, float] | None,
    label: str,
    colour: str,
    style: str,
) -> None:
    value = drawable((scores or {}).get(metric.key))
    if value is not None:
        axes.axhline(value, color=colour, linestyle=style, linewidth=1.6, label=label)
