"""comparison.html with its pictures, the CSV files, and table.md for a terminal."""

from pathlib import Path

from fedlora.report.comparison import Comparison, Entry, Level, parse_comparison
from fedlora.report.comparison_csv import curves_csv, runs_csv, summary_csv
from fedlora.report.comparison_table import (
    level_notes,
    level_table,
    missing_notes,
    signed,
    table_markdown,
)
from fedlora.report.markup import Html, element, section, visible
from fedlora.report.page import figure, figures, page
from fedlora.report.run_folder import read_object
from fedlora.report.run_tables import facts_table
from fedlora.storage import write_atomic


def write_comparison(folder: Path) -> Path:
    """Writes comparison.html, comparison.png, runs.csv, curves.csv, summary.csv and table.md.

    With several levels of skew comparison.png shows score by skew, and every level has its
    own picture of curves, `comparison-alpha0.1.png` and so on.

    Returns:
        the path of the page.

    Raises:
        RunFolderError: comparison.json is missing or is not a comparison.
        StorageError: the disk refused.
    """
    # matplotlib takes a second to import, which a command without a report must not pay
    from fedlora.report.comparison_figures import curves_figure
    from fedlora.report.score_figures import skew_figure
    from fedlora.report.theme import to_png

    source = folder / "comparison.json"
    found = read_object(source)
    comparison = parse_comparison(found, str(source))
    levels = comparison.levels
    path = folder / "comparison.html"
    texts = {
        "runs.csv": runs_csv(found),
        "curves.csv": curves_csv(found),
        "summary.csv": summary_csv(comparison),
        "table.md": table_markdown(comparison),
        path.name: comparison_page(comparison),
    }
    files = {name: text.encode("utf-8", errors="backslashreplace") for name, text in texts.items()}
    if len(levels) == 1:
        files["comparison.png"] = to_png(curves_figure(comparison, levels[0]))
    else:
        files["comparison.png"] = to_png(skew_figure(comparison))
        for level in levels:
            name = f"comparison-{level.name.replace(' ', '')}.png"
            files[name] = to_png(curves_figure(comparison, level))
    for name, data in files.items():
        write_atomic(folder / name, data)
    return path


def comparison_page(comparison: Comparison) -> str:
    """The page; equal comparisons give equal text."""
    from fedlora.report.score_figures import skew_figure
    from fedlora.report.theme import to_svg

    name = comparison.metric.name
    seeds = ", ".join(map(str, comparison.seeds))
    setting = (
        f"{comparison.rounds} rounds · {comparison.steps_per_client} steps per client · "
        f"seeds {seeds} · scores at equal {comparison.equal}"
    )
    parts = [
        *(
            element("p", f"{level.name}: " if level.name else "", sentence, css="lead")
            for level in comparison.levels
            for sentence in [level_sentence(comparison, level)]
        ),
        element("p", setting, css="muted"),
    ]
    if len(comparison.levels) > 1:
        drawn = to_svg(skew_figure(comparison), "by-skew", f"{name} by skew")
        caption = "Dots are means over seeds, bars one standard deviation to each side."
        if comparison.own_test:
            caption += (
                " Without data.test every level holds out rows of its own: compare contenders at "
                "one level, not one contender between levels."
            )
        parts.append(section("Score by skew", figure(drawn, caption, broad=True)))
    parts += [_level(comparison, level, i) for i, level in enumerate(comparison.levels)]
    if comparison.machine:
        parts.append(section("Machine", facts_table(comparison.machine)))
    return page(visible(comparison.name, 80), *parts)


def _level(comparison: Comparison, level: Level, number: int) -> Html:
    from fedlora.report.comparison_figures import by_round_figure, by_traffic_figure
    from fedlora.report.score_figures import differences_figure, scores_figure
    from fedlora.report.theme import to_svg

    name = comparison.metric.name
    at = f" at {level.name}" if level.name else ""
    rounds = to_svg(
        by_round_figure(comparison, level), f"by-round-{number}", f"{name} by round{at}"
    )
    traffic = to_svg(
        by_traffic_figure(comparison, level), f"by-traffic-{number}", f"{name} by bytes{at}"
    )
    scores = to_svg(
        scores_figure(comparison, level), f"scores-{number}", f"{name} of each seed{at}"
    )
    parts = [
        figures([figure(rounds), figure(traffic)]),
        element(
            "p",
            "Lines are means over seeds, bands one standard deviation to each side, baselines "
            "are dashed. Traffic is the mean over seeds.",
            css="muted",
        ),
        level_table(comparison, level),
        *(element("p", note, css="muted") for note in level_notes(comparison, level)),
        *(element("p", note, css="note") for note in missing_notes(comparison, level)),
        figure(scores, broad=True),
    ]
    if any(entry.difference for entry in level.entries):
        drawn = to_svg(
            differences_figure(comparison, level),
            f"differences-{number}",
            f"difference in {name} to {comparison.reference}, paired by seed{at}",
        )
        parts.append(figure(drawn, _difference_caption(level), broad=True))
    return section(f"Results at {level.name}" if level.name else "Results", *parts)


def _difference_caption(level: Level) -> str:
    if any(e.difference and e.difference.low is not None for e in level.entries):
        return "Dots are mean differences, lines their 95 % intervals by Student's t."
    return "Dots are differences on one seed; one seed gives no interval."


def level_sentence(comparison: Comparison, level: Level) -> str:
    """Which strategy has the best mean, and whether its lead can be told from chance."""
    metric = comparison.metric
    ranked = sorted(level.strategies, key=lambda entry: _rank(comparison, entry))
    if not ranked:
        return "No strategy has a score yet."
    best = ranked[0]
    found = best.spread
    spread = (
        f" ± {metric.format_difference(found.deviation)}" if found.deviation is not None else ""
    )
    score = f"{metric.format(found.mean)}{spread} {metric.name}"
    over = f"over {found.count} seeds" if found.count > 1 else "on one seed"
    if len(ranked) == 1:
        return f"{best.label} reaches {score} {over}."
    sentence = f"{best.label} is best with {score} {over}"
    # differences are known to the reference only; when that is best, the next one's is told
    other = best if best.label != comparison.reference else ranked[1]
    difference = other.difference
    if difference is None:
        return sentence + "."
    who = "it" if other is best else other.label
    sentence += f"; {who} differs from {comparison.reference} by {signed(metric, difference.mean)}"
    if difference.low is None or difference.high is None:
        return sentence + ", on one seed, so the order may be chance."
    interval = f"{signed(metric, difference.low)} to {signed(metric, difference.high)}"
    verdict = "" if difference.clear else ", so the order may be chance"
    return f"{sentence} (95 % interval {interval}){verdict}."


def _rank(comparison: Comparison, entry: Entry) -> float:
    assert entry.mean is not None
    return -entry.mean if comparison.metric.higher_better else entry.mean
