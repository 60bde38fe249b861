"""Turns a results file of the vision benchmark into tables and a picture.

    PYTHONPATH=. python -m benchmarks.vision.tabulate runs/vision/results.jsonl --out vision.md

Differences to FedIT are paired by seed: both runs share model, data, division and draws, so what
a seed adds to both cancels. Intervals are of Student's t.
"""

import argparse
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import stats

from benchmarks.vision.prepare import DOMAINS
from benchmarks.vision.run import Line, Results, best_rate, is_tuning
from benchmarks.vision.settings import FIRST_TUNING_SEED, SETTINGS
from fedlora.report.theme import CATEGORIES, INK, MUTED, themed, to_png

BASELINE = "fedit"


@dataclass(frozen=True)
class Estimate:
    """Mean of a sample, its standard deviation, standard error and 95 % interval.

    All but the mean are None for a single value.
    """

    mean: float
    deviation: float | None = None
    error: float | None = None
    interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class Row:
    """The scored runs of an arm at one learning rate, by seed."""

    arm: str
    rate: float
    runs: Mapping[int, Line]

    @property
    def failed(self) -> int:
        """How many runs did not reach the last round."""
        return sum(run["accuracy"] is None for run in self.runs.values())

    def values(self, key: str) -> list[float]:
        """The figure `key` of the runs that have it."""
        return [run[key] for run in self.runs.values() if run[key] is not None]


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and spread of at least one value."""
    if len(values) < 2:
        return Estimate(values[0])
    mean, deviation = fmean(values), stdev(values)
    error = deviation / math.sqrt(len(values))
    half = float(stats.t.ppf(0.975, len(values) - 1)) * error
    return Estimate(mean, deviation, error, (mean - half, mean + half))


def differences(row: Row, baseline: Row) -> list[float]:
    """Accuracy of `row` minus that of `baseline` on every seed where both have one."""
    return [
        run["accuracy"] - baseline.runs[seed]["accuracy"]
        for seed, run in sorted(row.runs.items())
        if seed in baseline.runs
        and run["accuracy"] is not None
        and baseline.runs[seed]["accuracy"] is not None
    ]


def scored(lines: Sequence[Line], setting: str) -> list[Row]:
    """The scored runs of a setting: FedIT's first, at its tuned rate, then by falling accuracy."""
    groups: dict[tuple[str, float], dict[int, Line]] = defaultdict(dict)
    for line in lines:
        if line["setting"] == setting and not is_tuning(line):
            groups[line["arm"], line["rate"]][line["seed"]] = line
    rows = [Row(arm, rate, runs) for (arm, rate), runs in groups.items()]

    tuned = best_rate(lines, setting, BASELINE)

    def order(row: Row) -> tuple[bool, bool, float]:
        other = row.arm != BASELINE
        return other, not other and row.rate != tuned, -fmean(row.values("accuracy") or [0.0])

    return sorted(rows, key=order)


def tables(lines: Sequence[Line], setting: str) -> str:
    """The Markdown of one setting: results, domains, and learning rates that were tried."""
    rows = scored(lines, setting)
    what = SETTINGS[setting]
    parts = [
        f"## {setting}",
        f"{what.rounds} rounds of {what.steps} steps, "
        + (f"{what.chosen} of 12 clients a round" if what.chosen else "6 clients, one a domain")
        + f", rank {', '.join(map(str, what.ranks))}.",
    ]
    if rows:
        parts += [_results(rows), _domains(rows)]
    tuned = [x for x in lines if x["setting"] == setting and is_tuning(x)]
    if tuned:
        parts.append(_rates(tuned))
    return "\n\n".join(parts)


@themed
def picture(lines: Sequence[Line]) -> Figure:
    """Paired differences to FedIT with their intervals, a panel per setting."""
    panels = []
    for setting in SETTINGS:
        rows = scored(lines, setting)
        if rows and rows[0].arm == BASELINE:
            others = [row for row in rows[1:] if differences(row, rows[0])]
            panels.append((setting, rows[0], others))
    panels = [panel for panel in panels if panel[2]]
    arms = list(dict.fromkeys(row.arm for _, _, rows in panels for row in rows))
    figure = Figure(
        figsize=(2.0 + 2.9 * max(1, len(panels)), 1.6 + 0.32 * len(arms)), layout="constrained"
    )
    every = figure.subplots(1, max(1, len(panels)), sharey=True, squeeze=False)[0]
    for axes, (setting, baseline, rows) in zip(every, panels, strict=False):
        axes.set_title(f"{setting}: FedIT {100 * fmean(baseline.values('accuracy')):.1f} %")
        axes.axvline(0.0, color=INK, linewidth=1.0)
        for row in rows:
            _interval(axes, arms.index(row.arm), row, baseline)
        axes.set_yticks(range(len(arms)), arms)
        axes.tick_params(axis="y", labelcolor=INK, length=0)
        axes.set_ylim(len(arms) - 0.5, -0.5)
    figure.supxlabel(
        "accuracy minus FedIT's, points: mean, 95 % interval, and every seed",
        color=MUTED,
        fontsize=10,
    )
    return figure


def main(arguments: Sequence[str] | None = None) -> None:
    """Writes the Markdown, and the picture beside it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    lines = Results(options.results).lines()
    commits = ", ".join(sorted({line["commit"] for line in lines}))
    image = options.out.with_suffix(".png")
    image.write_bytes(to_png(picture(lines)))
    present = [name for name in SETTINGS if any(line["setting"] == name for line in lines)]
    parts = [
        "# Vision benchmark: a tiny vision transformer on transformed digits",
        "Accuracy in percent, mean over six domains, after the last round; learning rates are "
        f"the best on seeds from {FIRST_TUNING_SEED} on, which are not scored. The difference to "
        "FedIT is paired by seed: mean ± standard error, and the 95 % interval of Student's t.",
        f"![differences to FedIT]({image.name})",
        *(tables(lines, name) for name in present),
        f"Commits: {commits}.",
    ]
    options.out.write_text("\n\n".join(parts) + "\n", "utf-8")
    print(options.out.read_text("utf-8"))


def _results(rows: Sequence[Row]) -> str:
    header = ["arm", "rate", "seeds", "accuracy", "s.d.", "s.e.", "minus FedIT", "95 % interval"]
    header += ["area under curve", "aggregation error", "up", "down", "server"]
    body = []
    for row in rows:
        cells = [row.arm, f"{row.rate:g}", str(len(row.runs))]
        if row.failed:
            # a mean over the runs that survived would flatter
            cells += [f"{row.failed} of {len(row.runs)} failed", *[""] * (len(header) - 4)]
            body.append(cells)
            continue
        found = estimate(row.values("accuracy"))
        cells += [_percent(found.mean), _percent(found.deviation), _percent(found.error)]
        cells += _compared(row, rows[0])
        errors = row.values("aggregation_error")
        cells += [
            _percent(fmean(row.values("auc"))),
            f"{fmean(errors):.3g}" if errors else "",
            *(f"{fmean(row.values(key)) / 1e6:.2f} MB" for key in ("bytes_up", "bytes_down")),
            f"{fmean(row.values('server_s')):.2f} s",
        ]
        body.append(cells)
    return _markdown(header, body)


def _compared(row: Row, baseline: Row) -> list[str]:
    pairs = differences(row, baseline)
    if row is baseline or baseline.arm != BASELINE or not pairs:
        return ["", ""]
    found = estimate(pairs)
    if found.error is None or found.interval is None:
        return [f"{100 * found.mean:+.1f}", ""]
    low, high = found.interval
    return [
        f"{100 * found.mean:+.1f} ± {100 * found.error:.1f}",
        f"{100 * low:+.1f} to {100 * high:+.1f}",
    ]


def _domains(rows: Sequence[Row]) -> str:
    body = [
        [row.arm, f"{row.rate:g}"]
        + [
            _percent(fmean(run["domains"][domain] for run in row.runs.values()))
            for domain in DOMAINS
        ]
        for row in rows
        if not row.failed
    ]
    return _markdown(["arm", "rate", *DOMAINS], body)


def _rates(tuned: Sequence[Line]) -> str:
    rates = sorted({line["rate"] for line in tuned})
    body = []
    for arm in sorted({line["arm"] for line in tuned}):
        cells = []
        for rate in rates:
            found = [x["accuracy"] for x in tuned if (x["arm"], x["rate"]) == (arm, rate)]
            failed = None in found
            cells.append("failed" if failed else _percent(fmean(found)) if found else "")
        body.append([arm, *cells])
    seeds = ", ".join(map(str, sorted({line["seed"] for line in tuned})))
    return _markdown([f"rates on seed {seeds}", *(f"{rate:g}" for rate in rates)], body)


def _interval(axes: Axes, place: int, row: Row, baseline: Row) -> None:
    pairs = [100 * value for value in differences(row, baseline)]
    found = estimate(pairs)
    colour = CATEGORIES[0]
    axes.plot(pairs, [place] * len(pairs), "o", color=colour, alpha=0.3, markersize=3.5)
    if found.interval:
        axes.plot(found.interval, [place, place], color=colour, linewidth=2.0)
    axes.plot([found.mean], [place], "o", color=colour, markersize=6)


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"


def _markdown(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *body))


if __name__ == "__main__":
    main()
