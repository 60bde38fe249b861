"""The end of a simulated run: its figures, its baselines, and what it leaves."""

import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from fedlora.adapter import AdapterState
from fedlora.checkpoint import RunStore
from fedlora.models.assemble import PERSONAL
from fedlora.server.results import close, save
from fedlora.server.run import Emit, Scores
from fedlora.server.soundness import global_adapter
from fedlora.simulation.baselines import run_centralised, run_local
from fedlora.simulation.federation import Federation
from fedlora.simulation.scoring import Judged, score_each
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
    alone: Mapping[str, Scores] = {}
    for name in job.evaluation.baselines:
        run = {"local": run_local, "centralised": run_centralised}[name]
        found = run(job, loaded, folder / "baselines" / name, emit)
        alone = found.pop("own", alone)
        summary["baselines"][name] = found
    summary["side_by_side"] = _side_by_side(federation, summary["clients"], alone)
    close(folder, state.round, summary, time.perf_counter() - started)
    return summary


def _per_client(federation: Federation, adapter: AdapterState, number: int) -> dict[str, Any]:
    """Each client's scores on its validation data: of base, global adapter, and its own."""
    data = {name: client.validation for name, client in federation.clients.items()}
    initial = federation.loaded.initial
    federation.hold(initial)
    with federation.loaded.adapted.base_only():
        base = score_each(federation, [Judged(lambda: initial, own) for own in data.values()])
    kinds: dict[str, Callable[[str], AdapterState]] = {"global": lambda name: adapter}
    if federation.strategy.personal:
        kinds["personal"] = lambda name: federation.personal(name, adapter, number)
    # a client's adapters stand side by side in one pass
    judged = [
        Judged(partial(make, name), own) for name, own in data.items() for make in kinds.values()
    ]
    scores = iter(score_each(federation, judged))
    return {
        name: {"base": before, **{kind: next(scores) for kind in kinds}}
        for name, before in zip(data, base, strict=True)
    }


def _side_by_side(
    federation: Federation, clients: Mapping[str, Mapping[str, Scores]], alone: Mapping[str, Scores]
) -> dict[str, list[dict[str, Any]]]:
    """Global and own adapter on the same validation data, one row per client.

    Args:
        clients: as `_per_client` gives it.
        alone: of adapters trained by clients alone; empty without that baseline.

    Returns:
        "personal", what the strategy left with each client, and "local", what it reaches
        alone; each only where there is such an adapter.
    """
    own = {
        "personal": {n: found["personal"] for n, found in clients.items() if "personal" in found},
        # clients that take no part here can be alone as well
        "local": {n: alone[n] for n in clients if n in alone},
    }
    return {
        kind: [
            {
                "client": name,
                "examples": len(federation.clients[name].validation),
                "global": clients[name]["global"],
                "own": found,
                "difference": {
                    key: found[key] - value
                    for key, value in clients[name]["global"].items()
                    if key in found
                },
            }
            for name, found in scores.items()
        ]
        for kind, scores in own.items()
        if scores
    }
