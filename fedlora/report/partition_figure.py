"""The partition as a picture: which client holds how many rows of which label.

Few labels make stacked bars; many make a heat-map; labels that each belong to one client
alone, as with one area per client, need no colours at all.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fedlora.report.markup import visible
from fedlora.report.natural_order import natural_key
from fedlora.report.theme import CATEGORIES, FEDERATED, INK, legend_above, themed

WIDTH = 9.6
MOST_STACKED_CLIENTS = 150
MOST_COLUMNS = 200
MOST_TICKS = 45
MOST_WRITTEN = 30
OTHERS = "all others"


@dataclass(frozen=True)
class Partition:
    """Rows by client and label.

    Attributes:
        clients: names, in order.
        labels: names, in order; empty when no client has a composition.
        counts: one row per client, one column per label.
    """

    clients: tuple[str, ...]
    labels: tuple[str, ...]
    counts: tuple[tuple[int, ...], ...]

    @property
    def disjoint(self) -> bool:
        """Every client has one label at most and no label has two clients."""
        return all(sum(n > 0 for n in row) <= 1 for row in self.counts) and all(
            sum(n > 0 for n in column) <= 1 for column in zip(*self.counts, strict=True)
        )


def partition_of(clients: Mapping[str, Mapping[str, Any]], order: Sequence[str] = ()) -> Partition:
    """Counts of the start event.

    Args:
        clients: facts by name; one without a composition has no rows here.
        order: class names of the data; other labels follow in natural order. The rarest
            labels beyond 200 share one column.
    """
    held = {name: dict(facts.get("composition") or {}) for name, facts in clients.items()}
    total: Counter[str] = Counter()
    for composition in held.values():
        total.update({str(label): int(n) for label, n in composition.items()})
    ranks = {label: i for i, label in enumerate(order)}
    labels = sorted(total, key=lambda label: (ranks.get(label, len(ranks)), natural_key(label)))
    if len(labels) > MOST_COLUMNS:
        common = {label for label, _ in total.most_common(MOST_COLUMNS - 1)}
        labels = [label for label in labels if label in common]
        for name, composition in held.items():
            kept = {label: n for label, n in composition.items() if label in common}
            held[name] = {**kept, OTHERS: sum(composition.values()) - sum(kept.values())}
        labels.append(OTHERS)
    names = sorted(held, key=natural_key)
    counts = tuple(tuple(int(held[name].get(label, 0)) for label in labels) for name in names)
    return Partition(tuple(names), tuple(labels), counts)


@themed
def partition_figure(parts: Partition) -> Figure:
    """The picture that suits the number of labels and clients."""
    height = min(7.5, 1.3 + 0.27 * len(parts.clients))
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    if parts.disjoint:
        axes = figure.add_subplot()
        _bars(axes, [sum(row) for row in parts.counts])
        _client_ticks(axes, parts, with_label=True)
    elif len(parts.labels) <= len(CATEGORIES) and len(parts.clients) <= MOST_STACKED_CLIENTS:
        axes = figure.add_subplot()
        _stacked(axes, parts)
        _client_ticks(axes, parts)
    else:
        grid = figure.add_gridspec(1, 2, width_ratios=(8, 1.2))
        axes = figure.add_subplot(grid[0])
        side = figure.add_subplot(grid[1])
        _heat(figure, axes, parts)
        _client_ticks(axes, parts)
        _totals(side, [sum(row) for row in parts.counts])
        side.set_ylim(axes.get_ylim())
        side.tick_params(left=False, labelleft=False)
    return figure


def _heat(figure: Figure, axes: Axes, parts: Partition) -> None:
    counts = np.array(parts.counts, dtype=float)
    top = max(counts.max(initial=0.0), 1.0)
    # transparent where there is nothing, so that the page shows through, dark or light;
    # the root keeps small counts visible beside large ones
    picture = np.zeros((*counts.shape, 4))
    picture[..., :3] = to_rgb(FEDERATED)
    picture[..., 3] = np.where(counts > 0, 0.1 + 0.9 * np.sqrt(counts / top), 0.0)
    axes.imshow(picture, aspect="auto", interpolation="nearest")
    axes.grid(visible=False)
    places = _thinned(len(parts.labels))
    numbers = len(parts.labels) > 60
    names = [_short(parts.labels[i], 18) for i in places]
    axes.set_xticks(places, names, rotation=90, fontsize=7.5 if numbers else 8.5)
    axes.tick_params(length=0)
    axes.set_title(f"rows of each label (darkest: {int(top)})", fontsize=10)


def _stacked(axes: Axes, parts: Partition) -> None:
    left = np.zeros(len(parts.clients))
    for i, label in enumerate(parts.labels):
        widths = np.array([row[i] for row in parts.counts], dtype=float)
        axes.barh(
            range(len(parts.clients)),
            widths,
            left=left,
            height=0.78,
            color=CATEGORIES[i],
            label=_short(label, 24),
        )
        left += widths
    _horizontal(axes)
    legend_above(axes, columns=6)


def _bars(axes: Axes, totals: Sequence[int]) -> None:
    axes.barh(range(len(totals)), totals, height=0.78, color=CATEGORIES[0])
    _horizontal(axes)


def _totals(axes: Axes, totals: Sequence[int]) -> None:
    axes.barh(range(len(totals)), totals, height=0.78, color=CATEGORIES[0])
    _horizontal(axes, most_ticks=2)
    if len(totals) <= MOST_WRITTEN:
        for place, total in enumerate(totals):
            axes.annotate(
                str(total),
                (total, place),
                xytext=(3, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
                color=INK,
                annotation_clip=False,
            )
        axes.set_xticks([])
        axes.set_xlim(0, 1.35 * max([*totals, 1]))
        axes.set_title("rows", fontsize=10)
        axes.set_xlabel("")


def _horizontal(axes: Axes, most_ticks: int = 6) -> None:
    axes.set_xlabel("rows")
    axes.grid(visible=False, axis="y")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=most_ticks, integer=True, min_n_ticks=1))
    axes.margins(y=0.02)


def _client_ticks(axes: Axes, parts: Partition, *, with_label: bool = False) -> None:
    names = []
    for name, row in zip(parts.clients, parts.counts, strict=True):
        text = _short(name, 24)
        held = [label for label, n in zip(parts.labels, row, strict=True) if n]
        if with_label and held and held[0] != name:
            text += f": {_short(held[0], 18)}"
        names.append(text)
    places = _thinned(len(names))
    axes.set_yticks(places, [names[i] for i in places], fontsize=8.5)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)


def _thinned(count: int) -> list[int]:
    step = 1
    # about 80 rotated names fit next to each other, but not that many rows
    while count / step > (MOST_TICKS if count > 2 * MOST_TICKS else 2 * MOST_TICKS):
        step += 1
    return list(range(0, count, step))


def _short(text: str, limit: int) -> str:
    return visible(text, limit) or "(empty)"
