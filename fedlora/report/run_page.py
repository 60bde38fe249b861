"""report.html: one run on one page."""

from pathlib import Path
from typing import Any

from fedlora.report.headline import Metric, headline
from fedlora.report.held_out import baseline
from fedlora.report.markup import (
    Html,
    details,
    element,
    preformatted,
    section,
    visible,
)
from fedlora.report.page import page
from fedlora.report.privacy_text import privacy_lines
from fedlora.report.result_sentence import result_sentence
from fedlora.report.run_folder import RunRecord, read_run
from fedlora.report.run_tables import (
    client_table,
    facts_table,
    rejected_table,
    score_table,
    seconds_table,
    unusable_table,
)
from fedlora.report.side_by_side import WHOSE, SideBySide, page_table, side_by_side
from fedlora.storage import write_atomic

MANY_CLIENTS = 24
MOST_ABANDONED = 3


def write_report(folder: Path) -> Path:
    """Writes report.html into a run folder, finished or not.

    Returns:
        the path of the page.

    Raises:
        RunFolderError: `folder` is not a run folder, or a file of it cannot be parsed.
        StorageError: the disk refused.
    """
    path = folder / "report.html"
    text = run_page(read_run(folder))
    write_atomic(path, text.encode("utf-8", errors="backslashreplace"))
    return path


def run_page(run: RunRecord) -> str:
    """The page; equal runs give equal text."""
    # these import matplotlib, which takes a second that no other command must pay
    from fedlora.report import run_pictures

    metric = headline(run.task, run.scores.get("base"))
    parts = [
        element("p", result_sentence(run, metric), css="lead"),
        _setting(run),
        *_notes(run),
        section("Result on held-out data", score_table(run), _score_note(run)),
    ]
    if run.rounds:
        parts.append(run_pictures.curves(run, metric))
    if run.clients:
        parts += [run_pictures.partition(run), _clients(run, metric)]
    parts += [_side_by_side(found) for found in side_by_side(run.scores, run.task)]
    if run.of("rejected"):
        parts.append(section("Rejected updates", rejected_table(run)))
    if run.rounds:
        parts += [run_pictures.aggregation_error(run), run_pictures.traffic(run)]
        parts.append(section("Time", seconds_table(run)))
        parts.append(_privacy(run))
    if (run.start.get("unusable") or {}).get("counts"):
        parts.append(section("Rows that could not be used", unusable_table(run)))
    parts.append(
        section(
            "How to get this again",
            facts_table(run.start.get("machine") or {}) if run.start.get("machine") else "",
            details("job.toml", preformatted(run.job_text)),
        )
    )
    return page(visible(run.name, 80), *parts)


def _setting(run: RunRecord) -> Html:
    model, data, job = run.section("model"), run.section("data"), run.section("run")
    partition = run.section("partition")
    strategy = run.start.get("strategy", run.section("federation").get("strategy"))
    method = run.start.get("method", run.section("adapter").get("method"))
    facts = [
        f"{strategy} over {method}, rank {run.section('adapter').get('rank')}",
        f"model {model.get('name')}",
        f"data {data.get('source')}, {partition.get('kind')} partition",
        f"engine {job.get('engine')}, seed {job.get('seed')}",
    ]
    if "num_trained" in run.start:
        facts.insert(1, f"{run.start['num_trained']:,} trained numbers")
    return element("p", " · ".join(facts), css="muted")


def _notes(run: RunRecord) -> list[Html]:
    notes = []
    if not run.finished:
        notes.append(f"This run is not finished: round {run.last_round} of {run.num_planned}.")
    if resumed := run.of("resume"):
        after = ", ".join(str(event.get("round")) for event in resumed)
        notes.append(f"Resumed after round {after} (dotted lines).")
    abandoned = run.of("abandoned")
    notes.extend(
        f"Round {event.get('round')}, attempt {int(event.get('attempt') or 0) + 1} was given up: "
        f"{event.get('why')}."
        for event in abandoned[:MOST_ABANDONED]
    )
    if len(abandoned) > MOST_ABANDONED:
        notes.append(f"{len(abandoned) - MOST_ABANDONED} more attempts were given up.")
    return [element("p", note, css="note") for note in notes]


def _score_note(run: RunRecord) -> Html:
    sentences = []
    if "num_test" in run.start:
        sentences.append(f"{run.start['num_test']} held-out examples.")
    if run.rounds:
        sentences.append("★ marks the best.")
    local = baseline(run.scores, "local")
    if local.get("mean"):
        steps = local.get("steps_per_client")
        budget = f", for {steps} steps each" if steps else ""
        sentences.append(
            f"Local-only: every client trains on its own data alone{budget}; the row is the "
            "mean of their scores."
        )
    if run.scores.get("personal"):
        sentences.append(
            "Every client has an adapter of its own; the federated row is the mean of their scores."
        )
    if baseline(run.scores, "centralised").get("final"):
        sentences.append("Centralised: one adapter trained on all clients' data together.")
    summary = _privacy_summary(run)
    if summary and run.scores.get("baselines"):
        how = "with the same budget" if summary["unit"] == "record" else "without privacy"
        sentences.append(f"Baselines are trained {how}.")
    return element("p", " ".join(sentences), css="muted")


def _privacy_summary(run: RunRecord) -> Any:
    return run.rounds[-1].get("privacy") if run.rounds else None


def _privacy(run: RunRecord) -> Html:
    lines = [visible(line) for line in privacy_lines(_privacy_summary(run))]
    return section("Privacy", *(element("p", f"{line[0].upper()}{line[1:]}") for line in lines))


def _clients(run: RunRecord, metric: Metric) -> Html:
    better = "higher" if metric.higher_better else "lower"
    text = (
        f"Scores are {metric.name} ({better} is better). “Own data” is the client's validation "
        "part; “alone” is what it reaches on the held-out set without the others."
    )
    if not run.scores.get("clients"):
        text = "The clients' data are on machines of their own, and were measured by nobody else."
    note = element("p", text, css="muted")
    rows = client_table(run, metric)
    if len(run.clients) > MANY_CLIENTS:
        rows = details(f"{len(run.clients)} clients", rows)
    return section("Clients", note, rows)


def _side_by_side(found: SideBySide) -> Html:
    better = "higher" if found.metric.higher_better else "lower"
    text = (
        f"Both are scored on the client's validation part, in {found.metric.name} ({better} is "
        "better); the difference is own minus global."
    )
    if found.kind == "personal":
        text += " The global adapter is the shared part by itself, with which a new client starts."
    note = element("p", f"{text} {found.verdict}", css="muted")
    rows = page_table(found)
    if len(found.rows) > MANY_CLIENTS:
        rows = details(f"{len(found.rows)} clients", rows)
    return section(f"Global and own adapter: {WHOSE[found.kind]}", note, rows)
