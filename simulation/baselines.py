"""Baselines at equal local work: each client alone, and all data in one place.

Both are runs of the same loop with one client, so that data order, learning rates and
evaluation are those of the federation. They keep their optimiser state between rounds, as
somebody who trains without a federation would.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from fedlora.adapter import AdapterState
from fedlora.checkpoint import RunStore
from fedlora.config.job import Job, ScenarioSection
from fedlora.data.federated import ClientData
from fedlora.data.unusable import Unusable
from fedlora.models.loaded import Loaded
from fedlora.report.run_folder import read_object
from fedlora.server.journal import Event
from fedlora.server.metrics import MetricsLog
from fedlora.server.rounds import resume_state
from fedlora.server.run import Emit, Run, Scores
from fedlora.server.soundness import global_adapter
from fedlora.simulation.federation import Federation
from fedlora.simulation.scoring import Judged, mean_scores, score_each
from fedlora.storage import write_atomic
from fedlora.strategies.plugin import begin
from fedlora.wire import encode_json

SCORES = "scores.json"


def run_local(job: Job, loaded: Loaded, folder: Path, emit: Emit | None = None) -> dict[str, Any]:
    """Every client trains alone for as many steps as in the federation.

    Args:
        job: the federation's job.
        loaded: its model and data.
        folder: one run folder per client is made in it, or continued.
        emit: receives the events of these runs.

    Returns:
        "mean" and "clients" (name -> scores on the global test data), "own" (name -> scores on
        the client's validation data), "steps_per_client".
    """
    chosen = job.federation.clients_per_round or len(loaded.data.clients)
    # as many steps as a client does on average when not all are chosen every round
    steps = max(1, round(job.training.local_steps * chosen / len(loaded.data.clients)))
    single = _single(job, steps, every=job.federation.rounds)
    # their adapters are scored side by side in the end
    untested = replace(loaded, data=replace(loaded.data, test=[]))
    for name, data in loaded.data.clients.items():
        _run(single, untested, {name: data}, folder / name, emit)
    found = _scores(job, single, loaded, folder)
    clients = {name: scores["test"] for name, scores in found.items()}
    return {
        "mean": mean_scores(list(clients.values())),
        "clients": clients,
        "own": {name: scores["own"] for name, scores in found.items()},
        "steps_per_client": job.federation.rounds * steps,
    }


def _scores(job: Job, single: Job, loaded: Loaded, folder: Path) -> dict[str, dict[str, Scores]]:
    """Scores of every client's last adapter, kept beside it: client -> "test" and "own"."""
    data = loaded.data.clients
    run = Run(job, loaded)
    missing = [name for name in data if not (folder / name / SCORES).is_file()]
    last = {name: partial(_last_adapter, single, loaded, folder / name) for name in missing}
    test = score_each(run, [Judged(last[name], loaded.data.test) for name in missing])
    own = score_each(run, [Judged(last[name], data[name].validation) for name in missing])
    for name, on_test, on_own in zip(missing, test, own, strict=True):
        found = {"test": on_test, "own": on_own}
        write_atomic(folder / name / SCORES, encode_json(found))
    return {name: read_object(folder / name / SCORES) for name in data}


def _last_adapter(job: Job, loaded: Loaded, folder: Path) -> AdapterState:
    run = Run(job, loaded)
    store = RunStore.open(folder, job.digest())
    try:
        committed = store.load()
    finally:
        store.close()
    return global_adapter(
        run.strategy, resume_state(committed, begin(run.strategy, loaded.initial))
    )


def run_centralised(
    job: Job, loaded: Loaded, folder: Path, emit: Emit | None = None
) -> dict[str, Any]:
    """One client with everybody's data does the local steps of all chosen clients.

    Returns:
        "rounds" (round, steps so far, scores) and "final" scores.
    """
    chosen = job.federation.clients_per_round or len(loaded.data.clients)
    steps = job.training.local_steps * chosen
    everything = ClientData(
        name="all",
        train=[e for client in loaded.data.clients.values() for e in client.train],
        validation=[],
        unusable=Unusable(),
        composition={"rows": sum(len(c.train) for c in loaded.data.clients.values())},
    )
    single = _single(job, steps, every=job.evaluation.every)
    events = _run(single, loaded, {"all": everything}, folder, emit)
    rounds = [
        {"round": e["round"], "steps": e["round"] * steps, "eval": e["eval"]}
        for e in events
        if e["eval"]
    ]
    return {"rounds": rounds, "final": _last_scores(events)}


def _single(job: Job, steps: int, every: int) -> Job:
    federation = job.federation.model_copy(
        update={
            "strategy": "fedit",
            "strategy_options": {},
            "wrappers": [],
            # there is nobody to wait for, and a buffer of several updates would never fill
            "mode": "sync",
            # a sum over one client is its update
            "secure_aggregation": False,
            "clients_per_round": None,
            "quorum": 1,
        }
    )
    # one client's examples can have their budget alone too; "one client" is no unit of one
    alone = job.privacy if job.privacy and job.privacy.unit == "record" else None
    return job.model_copy(
        update={
            "privacy": alone,
            "federation": federation,
            "training": job.training.model_copy(
                update={"local_steps": steps, "optimizer_state": "keep"}
            ),
            "scenario": ScenarioSection(),
            # one client at a time gains nothing from a pool
            "run": job.run.model_copy(update={"engine": "local"}),
            "evaluation": job.evaluation.model_copy(update={"every": every, "baselines": []}),
        }
    )


def _run(
    job: Job,
    loaded: Loaded,
    clients: Mapping[str, ClientData],
    folder: Path,
    emit: Callable[[Event], None] | None,
) -> list[Event]:
    federation = Federation(job, loaded, clients=clients, emit=emit)
    if (folder / "HEAD").is_file():
        store = RunStore.open(folder, job.digest())
    else:
        store = federation.start(folder)
    try:
        federation.run(store)
    finally:
        store.close()
    events = MetricsLog(folder / "metrics.jsonl").read()
    return [event for event in events if event["event"] == "round"]


def _last_scores(events: list[Event]) -> Scores:
    scores: Scores = events[-1]["eval"]
    return scores
