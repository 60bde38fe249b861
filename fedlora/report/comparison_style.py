"""What the pictures of a comparison share: one look per contender, the score axis, the legend."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from fedlora.report.comparison import Comparison, Level
from fedlora.report.headline import Metric
from fedlora.report.theme import CATEGORIES, INK, MUTED

LONGEST_LABEL = 32

Window = tuple[float, float]

_GREYS = (MUTED, "#a98f6f")
# shapes besides colours, for readers who do not see the difference of colours
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "h")


@dataclass(frozen=True)
class Look:
    """How one contender is drawn, in every picture and at every level."""

    colour: str
    marker: str
    line: str


def looks(comparison: Comparison) -> Mapping[str, Look]:
    """A look per label, by the order in which contenders were named."""
    strategies = [label for label, kind in comparison.labels.items() if kind != "baseline"]
    baselines = [label for label, kind in comparison.labels.items() if kind == "baseline"]
    return {
        **{
            label: Look(CATEGORIES[i % len(CATEGORIES)], _MARKERS[i % len(_MARKERS)], "-")
            for i, label in enumerate(strategies)
        },
        **{
            label: Look(_GREYS[i % len(_GREYS)], "", ("--", ":")[i % 2])
            for i, label in enumerate(baselines)
        },
    }


def score_window(level: Level, values: Sequence[float]) -> Window | None:
    """The part of the score axis where strategies differ; None to show all of it.

    A baseline far away would press all strategies into one line.

    Args:
        level: whose entries are drawn.
        values: the scores that must be seen.
    """
    finals = [entry.mean for entry in level.entries if entry.mean is not None]
    starts = [entry.curve[0].mean for entry in level.entries if entry.curve]
    everything = [*finals, *starts, *values]
    low, high = min(values, default=0.0), max(values, default=0.0)
    if low == high or high - low > 0.4 * (max(everything) - min(everything)):
        return None
    # what is near, such as training on all data together, stays in the picture
    near = [v for v in finals if low - (high - low) <= v <= high + (high - low)]
    low, high = min([low, *near]), max([high, *near])
    return low - 0.07 * (high - low), high + 0.07 * (high - low)


def legend_below(figure: Figure, axes: Axes, columns: int) -> None:
    """A legend under all axes, where it cannot cover a line."""
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        figure.legend(
            handles,
            labels,
            loc="outside lower center",
            ncols=min(columns, len(handles)),
            labelcolor=INK,
        )


def score_title(metric: Metric) -> str:
    """The name of a score and the direction that is better."""
    return f"Held-out {metric.name} ({'higher' if metric.higher_better else 'lower'} is better)"


def percent_axis(axis: Axis, metric: Metric, unit: str = " %") -> None:
    """Ticks of a fraction in percent."""
    if metric.percent:
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.4g}{unit}"))
