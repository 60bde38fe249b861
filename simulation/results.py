"""The end of a simulated run: its figures, its baselines, and what it leaves."""

import time
from typing import Any

from fedlora.adapter import AdapterState
from fedlora.checkpoint import RunStore
from fedlora.models.assemble import PERSONAL
from fedlora.server.results import close, save
from fedlora.server.run import Emit, Scores
from fedlora.server.soundness import global_adapter
from fedlora.simulation.baselines import run_centralised, run_local
from fedlora.simulation.federation import Federation
from fedlora.strategies.base import StrategyState


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
    job, loaded = federation.job, federation.loaded
    adapter = global_adapter(federation.strategy, state)
    folder, count = store.folder, len(federation.clients)
    if federation.strategy.personal:
        for name in federation.clients:
            own = federation.personal(name, adapter, state.round)
            save(federation, own, folder / PERSONAL / name, count, name)
    # last, for it says that the run has adapters to use
    save(federation, adapter, folder / "adapter", count)
    started = time.perf_counter()
    summary: dict[str, Any] = {
        "task": job.model.task,
        "base": federation.base_scores(),
        "global": federation.global_scores(adapter, state.round),
        "clients": _per_client(federation, adapter, state.round),
        "baselines": {},
    }
    if federation.strategy.personal:
        summary["personal"] = True
    for name in job.evaluation.baselines:
        run = {"local": run_local, "centralised": run_centralised}[name]
        summary["baselines"][name] = run(job, loaded, folder / "baselines" / name, emit)
    close(folder, state.round, summary, time.perf_counter() - started)
    return summary


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
