"""Turns the results of the merging benchmark into a page and a picture.

    PYTHONPATH=. python -m benchmarks.merging.tabulate benchmarks/results/merging.json

Differences to the baseline, the mean of the changes, are paired by seed, with the 95 % interval
of Student's t (`fedlora.report.paired`); they are not corrected for the number of contenders.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

from matplotlib.figure import Figure

from benchmarks.merging.contenders import BASELINE, CONTENDERS
from benchmarks.merging.train import CASES
from benchmarks.vision.prepare import DOMAINS
from benchmarks.vision.settings import FIRST_TUNING_SEED
from fedlora.report.paired import Paired, paired, spread
from fedlora.report.theme import CATEGORIES, INK, MUTED, themed, to_png

TUNED_BASELINE = "task-arithmetic, tuned"
BASE = "base model"
EXACT = (BASELINE, "flora", "fedex-lora")
"""Three divisions of the mean into slots, which the picture need not show."""
COMPARED = (
    ("lora-lego paper", BASELINE),
    ("lora-lego mass", BASELINE),
    ("lora-lego paper, times c", TUNED_BASELINE),
    ("lora-lego mass, times c", TUNED_BASELINE),
    ("lora-lego mass", "factor mean"),
    ("factor mean", BASELINE),
    ("flexlora", BASELINE),
    ("ties, tuned", TUNED_BASELINE),
    ("dare, tuned", TUNED_BASELINE),
    ("regmean", BASELINE),
    ("regmean, times c", TUNED_BASELINE),
    (BASELINE, BASE),
    ("factor mean", BASE),
    ("lora-lego mass", BASE),
)

Entries = Mapping[str, Mapping[str, Any]]


def accuracies(entries: Entries, contender: str) -> dict[int, float]:
    """Seed -> accuracy of a contender or of BASE, in percent."""
    if contender == BASE:
        return {int(seed): 100 * fmean(e["base"].values()) for seed, e in entries.items()}
    return {
        int(seed): 100 * line["accuracy"]
        for seed, entry in entries.items()
        for line in entry["lines"]
        if line["contender"] == contender
    }


def compare(entries: Entries, contender: str, reference: str) -> Paired:
    """The paired difference of two contenders in points; both must have a seed in common."""
    found = paired(accuracies(entries, contender), accuracies(entries, reference))
    assert found is not None
    return found


def ceiling(entry: Mapping[str, Any]) -> float:
    """Mean over adapters of the accuracy on their own domain, in percent."""
    return 100 * fmean(scores[domain] for domain, scores in entry["singles"].items())


def alone(entry: Mapping[str, Any]) -> float:
    """Mean over adapters of the mean accuracy over all domains, in percent."""
    return 100 * fmean(fmean(scores.values()) for scores in entry["singles"].values())


def table(entries: Entries) -> str:
    """One case: contenders by falling accuracy, references last."""
    header = ["method", "options (seed 100)", "accuracy", "s.d.", "minus mean", "95 % interval"]
    header += ["minus base", "95 % interval", "rank", "KB", "distance", "ms"]
    rows = []
    for contender in CONTENDERS:
        label = contender.label
        lines = [x for entry in entries.values() for x in entry["lines"] if x["contender"] == label]
        found = spread(list(accuracies(entries, label).values()))
        cells = [label, lines[0]["variant"], _number(found.mean), _number(found.deviation)]
        for reference in (BASELINE, BASE):
            cells += (
                ["", ""] if label == reference else _interval(compare(entries, label, reference))
            )
        cells += [
            str(lines[0]["rank"]),
            f"{lines[0]['bytes'] / 1000:.0f}",
            f"{fmean(line['distance'] for line in lines):.2f}",
            f"{1000 * median(line['seconds'] for line in lines):.0f}",
        ]
        rows.append((found.mean or 0.0, cells))
    rows.sort(key=lambda row: -row[0])
    body = [cells for _, cells in rows]
    for label, values in (
        ("*each adapter on its own domain*", [ceiling(entry) for entry in entries.values()]),
        ("*one adapter on all domains, mean*", [alone(e) for e in entries.values()]),
        ("*base model*", list(accuracies(entries, BASE).values())),
    ):
        found = spread(values)
        cells = [label, "", _number(found.mean), _number(found.deviation)]
        body.append(cells + [""] * (len(header) - len(cells)))
    return _markdown(header, body)


def claims(scored: Mapping[str, Entries]) -> str:
    """Chosen pairs of contenders in all cases."""
    header = ["difference, points", *CASES]
    body = []
    for label, reference in COMPARED:
        cells = [f"{label} minus {reference}"]
        for case in CASES:
            mean, interval = _interval(compare(scored[case], label, reference))
            cells.append(f"{mean} ({interval})")
        body.append(cells)
    return _markdown(header, body)


def singles(entries: Entries) -> str:
    """Each adapter on each domain, mean over seeds."""
    body = []
    for adapter in DOMAINS:
        scores = [
            100 * fmean(entry["singles"][adapter][domain] for entry in entries.values())
            for domain in DOMAINS
        ]
        body.append([adapter, *map(_number, [*scores, fmean(scores)])])
    base = [100 * fmean(e["base"][domain] for e in entries.values()) for domain in DOMAINS]
    body.append(["base model", *map(_number, [*base, fmean(base)])])
    return _markdown(["adapter", *DOMAINS, "mean"], body)


@themed
def picture(scored: Mapping[str, Entries]) -> Figure:
    """Paired differences to the mean of the changes with their intervals, a panel per case."""
    labels = [contender.label for contender in CONTENDERS if contender.label not in EXACT]
    figure = Figure(figsize=(11.5, 1.5 + 0.27 * len(labels)), layout="constrained")
    panels = figure.subplots(1, len(CASES), sharey=True, sharex=True)
    for axes, name in zip(panels, CASES, strict=True):
        entries = scored[name]
        centre = fmean(accuracies(entries, BASELINE).values())
        base = fmean(accuracies(entries, BASE).values())
        axes.set_title(f"{name}: mean {centre:.1f} %,\nbase model {base:.1f} %", fontsize=10)
        axes.axvline(0.0, color=INK, linewidth=1.0)
        for place, label in enumerate(labels):
            found = compare(entries, label, BASELINE)
            values, reference = accuracies(entries, label), accuracies(entries, BASELINE)
            colour = CATEGORIES[1 if label.startswith("lora-lego") else 0]
            pairs = [values[seed] - reference[seed] for seed in values]
            axes.plot(pairs, [place] * len(pairs), "o", color=colour, alpha=0.3, markersize=3.5)
            if found.low is not None:
                axes.plot([found.low, found.high], [place, place], color=colour, linewidth=2.0)
            axes.plot([found.mean], [place], "o", color=colour, markersize=6)
        axes.set_yticks(range(len(labels)), labels)
        axes.tick_params(axis="y", labelcolor=INK, length=0)
        axes.set_ylim(len(labels) - 0.5, -0.5)
    figure.supxlabel(
        "accuracy minus that of the mean of the changes, points: mean, 95 % interval, every seed",
        color=MUTED,
        fontsize=10,
    )
    return figure


def write(path: Path) -> str:
    """Writes page and picture beside the results, and returns the page.

    Args:
        path: the results, `<name>.json`; what people concluded from them is taken from
            `<name>.findings.md`, if it is there.
    """
    found = json.loads(path.read_text("utf-8"))
    scored: dict[str, Entries] = {
        name: {seed: e for seed, e in entries.items() if int(seed) < FIRST_TUNING_SEED}
        for name, entries in found["seeds"].items()
    }
    commits = {e["commit"] for entries in found["seeds"].values() for e in entries.values()}
    findings = path.with_name(f"{path.stem}.findings.md")
    image = path.with_suffix(".png")
    image.write_bytes(to_png(picture(scored)))
    seeds = ", ".join(next(iter(scored.values())))
    where = ", ".join(f"{key} {value}" for key, value in sorted(found["machine"].items()))
    parts = [
        "# One-shot merging of adapters that were trained apart",
        "    PYTHONPATH=. python -m benchmarks.merging.run --work runs/vision "
        "--adapters runs/merging",
        "The tiny vision transformer and the six domains of digits of the vision benchmark. One "
        f"LoRA per domain (scale 2, AdamW, rate {found['rate']:g}, cosine, {found['steps']} steps "
        "of 32 pictures), trained on that domain alone, then merged at equal weight by "
        "`fedlora.merging`, as `fedlora merge` does. Accuracy in percent, mean over the "
        f"domains' test pictures; seeds {seeds}, which change data, model and adapters. Options "
        "are the best of a small grid on seed 100, which is not scored. Intervals are of "
        "Student's t over differences paired by seed, one pair at a time: of so many, about one "
        "in twenty misses its target.",
        f"![differences to the mean]({image.name})",
        *([findings.read_text("utf-8").strip()] if findings.is_file() else []),
        "## Chosen pairs",
        claims(scored),
    ]
    for name, case in CASES.items():
        cosine = fmean(entry["cosine"] for entry in scored[name].values())
        parts += [
            f"## {name}: {case.title}",
            f"Mean cosine between two adapters' changes: {cosine:.3f}.",
            table(scored[name]),
        ]
    parts += [
        "Distance is from the mean change, as a part of its norm; KB are those of float32 "
        "factors; ms is the median time of the merge alone (for regmean without its statistics "
        'of the data), on a machine with other work. "times c" multiplies the merged change '
        "by a tuned factor, which is no option of these methods: it parts the direction of the "
        "result from its length. r is the largest rank of an adapter.",
        "## Each adapter alone (own)",
        singles(scored["own"]),
        f"Commits {', '.join(sorted(commits))}. Machine: {where}.",
    ]
    text = "\n\n".join(parts) + "\n"
    path.with_suffix(".md").write_text(text, "utf-8")
    return text


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("results", type=Path)
    print(write(parser.parse_args(arguments).results))


def _interval(found: Paired) -> list[str]:
    if found.low is None or found.high is None:
        return [f"{found.mean:+.1f}", ""]
    return [f"{found.mean:+.1f}", f"{found.low:+.1f} to {found.high:+.1f}"]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def _markdown(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *body))


if __name__ == "__main__":
    main()
