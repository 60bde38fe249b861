"""A comparison's table at one level of skew, as HTML and Markdown, and what must be said of it."""

from fedlora.report.comparison import Comparison, Entry, Level
from fedlora.report.headline import MISSING, Metric
from fedlora.report.markup import Cell, Html, element, format_bytes, table, visible

MEAN = 3
LEFT = 2


def table_markdown(comparison: Comparison) -> str:
    """All levels, each with its notes."""
    blocks = []
    for level in comparison.levels:
        header = _header(comparison, level)
        right = "|".join([*["---"] * LEFT, *["---:"] * (len(header) - LEFT)])
        lines = [f"## {level.name}", ""] if level.name else []
        lines += [_line(header), f"|{right}|"]
        lines += [_line(_cells(comparison, level, entry)) for entry in level.entries]
        notes = [*level_notes(comparison, level), *missing_notes(comparison, level)]
        blocks.append("\n".join([*lines, "", *map(visible, notes)]))
    return "\n\n".join(blocks) + "\n"


def level_table(comparison: Comparison, level: Level) -> Html:
    """One level, the best mean marked."""
    ranked = comparison.metric.best([entry.mean for entry in level.entries])
    lines: list[list[Cell]] = []
    for i, entry in enumerate(level.entries):
        cells: list[Cell] = list(_cells(comparison, level, entry))
        if i in ranked:
            cells[MEAN] = element("span", f"{cells[MEAN]} ★", css="best")
        lines.append(cells)
    header = _header(comparison, level)
    return table(header, lines, numeric=range(LEFT, len(header)))


def level_notes(comparison: Comparison, level: Level) -> list[str]:
    """How scores were read, and what the intervals are."""
    notes = []
    if comparison.equal == "bytes" and level.num_bytes is not None:
        notes.append(
            f"Scores are read at equal traffic: the last evaluated round within "
            f"{format_bytes(level.num_bytes)} ({level.num_bytes:,} bytes) up and down, all clients "
            "together, which every strategy reached. Baselines send nothing and are read at equal "
            "rounds only."
        )
    elif level.rounds is not None:
        notes.append(
            f"Scores are read at round {level.rounds}, the last that every strategy evaluated."
        )
    if len(comparison.seeds) == 1:
        notes.append(
            "One seed: no spread and no interval can be given, and the order may be chance."
        )
    elif comparison.reference is not None:
        notes.append(
            f"Differences are the score minus that of {comparison.reference}, paired by seed; "
            "intervals are 95 % by Student's t, each on its own, not corrected for several "
            "comparisons."
        )
    if comparison.own_test and len(comparison.seeds) > 1:
        notes.append(
            "Without data.test every seed holds out rows of its own, so the standard deviation "
            "over seeds holds their spread too; paired differences are taken on the same rows."
        )
    return notes


def missing_notes(comparison: Comparison, level: Level) -> list[str]:
    """Every run that is in no mean, and why."""
    notes = []
    for entry in level.entries:
        for seed, reason in entry.failures.items():
            notes.append(f"{entry.label}, seed {seed} failed and is in no mean: {reason}")
        if entry.without_score and not (entry.kind == "baseline" and comparison.equal == "bytes"):
            notes.append(
                f"{entry.label}: {entry.without_score} of {len(entry.seeds)} runs have no finite "
                "score where they are read, and are in no mean."
            )
    return notes


def signed(metric: Metric, value: float) -> str:
    """A difference with its sign."""
    return f"{'−' if value < 0 else '+'}{metric.format_difference(value)}"


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(visible(cell).replace("|", "\\|") for cell in cells) + " |"


def _header(comparison: Comparison, level: Level) -> list[str]:
    name = comparison.metric.name
    at_bytes = comparison.equal == "bytes"
    return [
        "label",
        "kind",
        "n",
        f"{name}, mean",
        "standard deviation",
        f"difference to {comparison.reference}" if comparison.reference else "difference",
        "standard error",
        "95 % interval",
        "read at round",
        *([f"{name} at round {level.rounds}"] if at_bytes else []),
        "aggregation error",
        "bytes up",
        "bytes down",
        "server seconds",
    ]


def _cells(comparison: Comparison, level: Level, entry: Entry) -> list[str]:
    metric, error, found = comparison.metric, entry.aggregation_error, entry.spread
    equal_rounds = list(entry.at_rounds.values())
    same = sum(equal_rounds) / len(equal_rounds) if equal_rounds else None
    return [
        entry.label,
        entry.kind,
        _count(entry),
        metric.format(found.mean),
        _size(metric, found.deviation),
        *_difference(comparison, entry),
        _rounds(entry),
        *([metric.format(same)] if comparison.equal == "bytes" else []),
        MISSING if error is None else f"{error:.3g}",
        MISSING if entry.bytes_up is None else format_bytes(entry.bytes_up),
        MISSING if entry.bytes_down is None else format_bytes(entry.bytes_down),
        MISSING if entry.server_s is None else f"{entry.server_s:.2f}",
    ]


def _count(entry: Entry) -> str:
    if not entry.read and not entry.failures:
        return MISSING
    count, planned = len(entry.values), len(entry.seeds)
    failed = f" ({len(entry.failures)} failed)" if entry.failures else ""
    return f"{count}" if count == planned else f"{count} of {planned}{failed}"


def _difference(comparison: Comparison, entry: Entry) -> list[str]:
    metric, found = comparison.metric, entry.difference
    if entry.label == comparison.reference:
        return ["reference", MISSING, MISSING]
    if found is None:
        return [MISSING] * 3
    if found.low is None or found.high is None:
        return [signed(metric, found.mean), MISSING, f"{MISSING} (one seed)"]
    interval = f"{signed(metric, found.low)} to {signed(metric, found.high)}"
    return [signed(metric, found.mean), _size(metric, found.error), interval]


def _rounds(entry: Entry) -> str:
    rounds = {point.round for point in entry.read}
    if not rounds:
        return MISSING
    low, high = min(rounds), max(rounds)
    return f"{low}" if low == high else f"{low} to {high}"


def _size(metric: Metric, value: float | None) -> str:
    return MISSING if value is None else metric.format_difference(value)
