"""What a finished run leaves: the adapter with its card, a summary, the report."""

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedlora.adapter import AdapterState
from fedlora.adapters.files import AdapterFolder, save_adapter
from fedlora.models.assemble import PERSONAL
from fedlora.server.metrics import MetricsLog
from fedlora.server.run import Run
from fedlora.storage import write_atomic
from fedlora.wire import encode_json


def save(
    run: Run, adapter: AdapterState, folder: Path, num_clients: int, client: str | None = None
) -> None:
    """Writes an adapter folder with its card.

    Args:
        num_clients: clients of the federation.
        client: whose adapter it is, when every client has one of its own.

    Raises:
        StorageError: the disk refused.
    """
    job = run.job
    save_adapter(
        folder,
        AdapterFolder(
            spec=adapter.spec,
            tensors=adapter.tensors,
            basis=run.sent_basis,
            base_model=job.model.name,
            task=job.model.task,
            labels=run.loaded.data.labels,
            revision=job.model.revision,
            dtype=job.model.dtype,
        ),
        card(run, adapter, num_clients, client),
    )


def close(folder: Path, number: int, summary: Mapping[str, Any], seconds: float) -> None:
    """Writes summary and report, and then the end event, which says that nothing is missing.

    Args:
        folder: the run's.
        number: the last round.
        summary: what summary.json holds.
        seconds: what finishing took so far.
    """
    from fedlora.report.run_page import write_report

    write_atomic(folder / "summary.json", encode_json(summary))
    baselines = summary["baselines"].items()
    end = {
        "event": "end",
        "round": number,
        "eval": summary["global"],
        "baselines": {name: found.get("mean", found.get("final")) for name, found in baselines},
        "side_by_side": summary.get("side_by_side", {}),
        "seconds": {"finish": round(seconds, 3)},
    }
    write_report(folder)
    log = MetricsLog(folder / "metrics.jsonl")
    if not any(event["event"] == "end" for event in log.read()):
        log.append(end)


def is_finished(folder: Path) -> bool:
    """The run has ended and left its summary."""
    events = MetricsLog(folder / "metrics.jsonl").read()
    return (folder / "summary.json").is_file() and any(e["event"] == "end" for e in events)


def card(run: Run, adapter: AdapterState, num_clients: int, client: str | None = None) -> str:
    """What people should know of the adapter, in Markdown; see `save`."""
    job, spec = run.job, adapter.spec
    whose = ""
    if client is not None:
        whose = f"\nThis is the adapter of client {client}: the shared part and its own.\n"
    elif run.strategy.personal:
        whose = (
            "\nThis is the shared part, with which a new client starts. It is no model by itself: "
            f"the adapters of the clients are in `{PERSONAL}/`.\n"
        )
    from fedlora.report.privacy_text import privacy_lines

    privacy = "\n".join(
        textwrap.fill(f"- privacy: {line}", 96, subsequent_indent="  ", break_on_hyphens=False)
        for line in privacy_lines(run.privacy.summary())
    )
    return f"""# {job.run.name}

A `{spec.method}` adapter of rank {spec.rank} (alpha {spec.alpha:g}) for `{job.model.name}`,
task {job.model.task}, trained by {num_clients} clients in
{job.federation.rounds} rounds of {job.training.local_steps} local steps with strategy
`{job.federation.strategy}`, without moving their data.
{whose}
- adapted layers: {len(spec.layers)}; heads trained in full: {", ".join(spec.heads) or "none"}
- base model fingerprint: `{spec.base_fingerprint}`
{privacy}

Load it with `fedlora evaluate` or `fedlora export`.
"""
