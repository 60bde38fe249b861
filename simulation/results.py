"""What a finished run leaves: the adapter, a summary, the report."""

import time
from pathlib import Path
from typing import Any

from fedlora.adapter import AdapterState
from fedlora.adapters.files import AdapterFolder, save_adapter
from fedlora.checkpoint import RunStore
from fedlora.models.assemble import PERSONAL
from fedlora.server.soundness import global_adapter
from fedlora.simulation.baselines import run_centralised, run_local
from fedlora.simulation.federation import Emit, Federation, Scores
from fedlora.simulation.metrics import MetricsLog
from fedlora.storage import write_atomic
from fedlora.strategies.base import StrategyState
from fedlora.wire import encode_json


def finish(
    federation: Federation, store: RunStore, state: StrategyState, emit: Emit | None = None
) -> dict[str, Any]:
    """Evaluates, runs the job's baselines, and writes adapter, summary and report.

    Args:
        federation: the run, in its last round.
        store: its folder.
        state: its last state.
        emit: receives the events of the baselines.

    Returns:
        the summary, as written to summary.json.
    """
    from fedlora.report.run_page import write_report

    job, loaded = federation.job, federation.loaded
    adapter = global_adapter(federation.strategy, state)
    folder = store.folder
    if federation.strategy.personal:
        for name in federation.clients:
            own = federation.personal(name, adapter, state.round)
            _save(federation, own, folder / PERSONAL / name, name)
    # last, for it says that the run has adapters to use
    _save(federation, adapter, folder / "adapter")
    started = time.perf_counter()
    summary: dict[str, Any] = {
        "task": job.model.task,
        "base": _base(federation),
        "global": federation.global_scores(adapter, state.round),
        "clients": _per_client(federation, adapter, state.round),
        "baselines": {},
    }
    if federation.strategy.personal:
        summary["personal"] = True
    for name in job.evaluation.baselines:
        run = {"local": run_local, "centralised": run_centralised}[name]
        summary["baselines"][name] = run(job, loaded, folder / "baselines" / name, emit)
    write_atomic(folder / "summary.json", encode_json(summary))
    end = {
        "event": "end",
        "round": state.round,
        "eval": summary["global"],
        "baselines": {k: v.get("mean", v.get("final")) for k, v in summary["baselines"].items()},
        "seconds": {"finish": round(time.perf_counter() - started, 3)},
    }
    write_report(folder)
    # last, because it says that nothing is missing
    log = MetricsLog(folder / "metrics.jsonl")
    if not any(event["event"] == "end" for event in log.read()):
        log.append(end)
    return summary


def _save(
    federation: Federation, adapter: AdapterState, folder: Path, client: str | None = None
) -> None:
    job = federation.job
    save_adapter(
        folder,
        AdapterFolder(
            spec=adapter.spec,
            tensors=adapter.tensors,
            basis=federation.sent_basis,
            base_model=job.model.name,
            task=job.model.task,
            labels=federation.loaded.data.labels,
            revision=job.model.revision,
            dtype=job.model.dtype,
        ),
        card(federation, adapter, client),
    )


def is_finished(folder: Path) -> bool:
    """The run has ended and left its summary."""
    events = MetricsLog(folder / "metrics.jsonl").read()
    return (folder / "summary.json").is_file() and any(e["event"] == "end" for e in events)


def card(federation: Federation, adapter: AdapterState, client: str | None = None) -> str:
    """What people should know of the adapter, in Markdown.

    Args:
        client: whose adapter it is, when every client has one of its own.
    """
    job, spec = federation.job, adapter.spec
    whose = ""
    if client is not None:
        whose = f"\nThis is the adapter of client {client}: the shared part and its own.\n"
    elif federation.strategy.personal:
        whose = (
            "\nThis is the shared part, with which a new client starts. It is no model by itself: "
            f"the adapters of the clients are in `{PERSONAL}/`.\n"
        )
    return f"""# {job.run.name}

A `{spec.method}` adapter of rank {spec.rank} (alpha {spec.alpha:g}) for `{job.model.name}`,
task {job.model.task}, trained by {len(federation.clients)} clients in
{job.federation.rounds} rounds of {job.training.local_steps} local steps with strategy
`{job.federation.strategy}`, without moving their data.
{whose}
- adapted layers: {len(spec.layers)}; heads trained in full: {", ".join(spec.heads) or "none"}
- base model fingerprint: `{spec.base_fingerprint}`
- privacy: no differential privacy. The adapter may reveal training data; treat it as
  confidential as the data themselves.

Load it with `fedlora evaluate` or `fedlora export`.
"""


def _base(federation: Federation) -> Scores:
    federation.hold(federation.loaded.initial)
    with federation.loaded.adapted.base_only():
        return federation.scores(federation.loaded.data.test)


def _per_client(federation: Federation, adapter: AdapterState, number: int) -> dict[str, Any]:
    found: dict[str, dict[str, Scores]] = {name: {} for name in federation.clients}
    federation.hold(federation.loaded.initial)
    with federation.loaded.adapted.base_only():
        for name, data in federation.clients.items():
            found[name]["base"] = federation.scores(data.validation)
    federation.hold(adapter)
    for name, data in federation.clients.items():
        if federation.strategy.personal:
            federation.hold(federation.personal(name, adapter, number))
        kind = "personal" if federation.strategy.personal else "global"
        found[name][kind] = federation.scores(data.validation)
    return found
