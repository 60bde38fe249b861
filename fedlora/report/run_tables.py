"""Tables of one run's page."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from fedlora.report.headline import MISSING, Metric
from fedlora.report.held_out import baseline, columns, held_out_rows
from fedlora.report.markup import Cell, Html, element, format_bytes, join, table, visible
from fedlora.report.natural_order import natural_key
from fedlora.report.run_folder import RunRecord, drawable

FIRST_DETAILS = 3
MOST_CHARACTERS = 300

CLIENT_COLUMNS = (
    "client",
    "rank",
    "train",
    "validation",
    "base, own data",
    "federated, own data",
    "alone, held-out",
    "rounds",
    "no reply",
    "rejected",
    "hostile",
)
TEXT_COLUMNS = ("client", "hostile")


def score_table(run: RunRecord) -> Html:
    """Base, local-only, federated and centralised on the held-out set."""
    rows = held_out_rows(run.scores)
    if not rows:
        return element("p", "Nothing is measured yet.")
    metrics = columns(run.task, rows)
    best = {m.key: m.best([row.scores.get(m.key) for row in rows]) for m in metrics}
    lines: list[list[Cell]] = []
    for i, row in enumerate(rows):
        cells: list[Cell] = [row.name]
        for metric in metrics:
            text = metric.format(row.scores.get(metric.key))
            first = i in best[metric.key]
            cells.append(element("span", f"{text} ★", css="best") if first else text)
        lines.append(cells)
    header = ["model", *(f"{m.name} {'↑' if m.higher_better else '↓'}" for m in metrics)]
    return table(header, lines, numeric=range(1, len(header)))


def client_table(run: RunRecord, metric: Metric) -> Html:
    """Every client: its hardware, data, scores, and how its updates fared.

    Columns that no client has anything in are left out.
    """
    part = Counter(name for event in run.rounds for name in event.get("clients") or [])
    silent = Counter(name for event in run.rounds for name in event.get("missing") or [])
    rejected = Counter(str(event.get("client")) for event in run.of("rejected"))
    # rounds that are private to clients do not say who took part
    hidden = any(event.get("rejected", 0) is None for event in run.rounds)
    own = run.scores.get("clients") or {}
    alone = baseline(run.scores, "local").get("clients") or {}
    lines: list[list[Cell]] = []
    for name in sorted(run.clients, key=natural_key):
        facts, scores = run.clients[name], own.get(name) or {}
        before = drawable((scores.get("base") or {}).get(metric.key))
        final = scores.get("personal") or scores.get("global") or {}
        after = drawable(final.get(metric.key))
        lines.append(
            [
                name,
                str(facts.get("rank", MISSING)),
                str(facts.get("train", MISSING)),
                str(facts.get("validation", MISSING)),
                metric.format(before),
                _judged(metric, before, after),
                metric.format(drawable((alone.get(name) or {}).get(metric.key))),
                *(MISSING if hidden else str(count[name]) for count in (part, silent, rejected)),
                ", ".join(facts.get("hostile") or []),
            ]
        )
    used = [
        i for i in range(len(CLIENT_COLUMNS)) if any(line[i] not in ("", MISSING) for line in lines)
    ]
    return table(
        [CLIENT_COLUMNS[i] for i in used],
        [[line[i] for i in used] for line in lines],
        numeric=[place for place, i in enumerate(used) if CLIENT_COLUMNS[i] not in TEXT_COLUMNS],
    )


def _judged(metric: Metric, before: float | None, after: float | None) -> Cell:
    text = metric.format(after)
    if before is None or after is None or before == after:
        return text
    better = metric.gain(after, before) > 0
    return element("span", text, css="good" if better else "bad")


def rejected_table(run: RunRecord) -> Html:
    """Refused updates by reason, with what the first of them said."""
    by_code: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for event in run.of("rejected"):
        by_code[str(event.get("code"))].append(event)
    lines: list[list[Cell]] = []
    for code, events in sorted(by_code.items(), key=lambda item: (-len(item[1]), item[0])):
        first = [
            f"round {event.get('round')}, {event.get('client')}: {event.get('detail')}"
            for event in events[:FIRST_DETAILS]
        ]
        lines.append([code, str(len(events)), _several(first, len(events))])
    return table(["reason", "updates", "first"], lines, numeric=[1])


def unusable_table(run: RunRecord) -> Html:
    """Rows of the data that could not be used, by reason."""
    unusable = run.start.get("unusable") or {}
    first = unusable.get("first") or {}
    lines: list[list[Cell]] = [
        [reason, str(count), _several([str(o) for o in first.get(reason) or []], int(count))]
        for reason, count in sorted((unusable.get("counts") or {}).items())
    ]
    return table(["reason", "rows", "first"], lines, numeric=[1])


def _several(shown: Iterable[str], count: int) -> Html:
    lines: list[Cell] = [element("div", visible(text, MOST_CHARACTERS)) for text in shown]
    if count > len(lines):
        lines.append(element("div", f"and {count - len(lines)} more", css="muted"))
    return element("div", join(lines, ""), css="wide")


def traffic_table(run: RunRecord) -> Html:
    """Bytes per round and in total."""
    lines = []
    for name, key in (("up, clients to server", "bytes_up"), ("down", "bytes_down")):
        counts = [int(event.get(key) or 0) for event in run.rounds]
        mean = sum(counts) / len(counts)
        lines.append([name, format_bytes(mean), format_bytes(sum(counts)), f"{sum(counts):,}"])
    return table(["direction", "per round", "total", "bytes"], lines, numeric=[1, 2, 3])


def seconds_table(run: RunRecord) -> Html:
    """Wall seconds by stage, over all committed rounds."""
    total: dict[str, float] = defaultdict(float)
    for event in run.rounds:
        for stage, seconds in (event.get("seconds") or {}).items():
            total[stage] += drawable(seconds) or 0.0
    whole = sum(total.values()) or 1.0
    lines: list[list[Cell]] = []
    for stage, seconds in sorted(total.items(), key=lambda item: (-item[1], item[0])):
        share = 100 * seconds / whole
        bar = Html(
            f'<span class="track"><span class="bar" style="width:{share:.1f}%"></span></span>'
        )
        mean = seconds / len(run.rounds)
        name = stage.replace("_", " ")
        lines.append([name, f"{seconds:.2f}", f"{mean:.3f}", f"{share:.1f} %", bar])
    header = ["stage", "seconds", "per round", "share", ""]
    return table(header, lines, numeric=[1, 2, 3])


def facts_table(facts: Mapping[str, Any]) -> Html:
    """Names and values."""
    return table([], [[str(key), str(value)] for key, value in sorted(facts.items())])
