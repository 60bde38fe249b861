"""One run of a comparison: made or continued in its folder, and its figures."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedlora.checkpoint import RunStore
from fedlora.config.job import Job
from fedlora.config.load import load_job
from fedlora.errors import QuorumFailed, RunFolderError, StrategyError
from fedlora.models.loaded import Loaded
from fedlora.server.journal import Event
from fedlora.server.metrics import MetricsLog
from fedlora.server.run import Emit
from fedlora.simulation.baselines import run_centralised, run_local
from fedlora.simulation.federation import Federation

Scores = Mapping[str, float]
Figures = dict[str, Any]

# what one contender can do wrong without a word about the others
CONTENDER_FAILED = (StrategyError, QuorumFailed)
MOST_NAMED = 3


def check_folder(job: Job, folder: Path, who: str) -> None:
    """Refuses to continue a run that was made with other settings.

    Args:
        job: what the run should be.
        folder: its folder, which need not exist.
        who: names the run in the error.

    Raises:
        RunFolderError: with the settings that differ.
    """
    path = folder / "job.toml"
    if not path.is_file():
        return
    old = _flat(load_job(path).model_dump(mode="json"))
    new = _flat(job.model_dump(mode="json"))
    changed = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    if not changed:
        return
    named = [f"{key} = {old.get(key)!r}, now {new.get(key)!r}" for key in changed[:MOST_NAMED]]
    if len(changed) > MOST_NAMED:
        named.append(f"and {len(changed) - MOST_NAMED} more")
    raise RunFolderError(
        f"{who}: {folder} was made with other settings ({'; '.join(named)}); choose another "
        "--out, or delete that folder to run it anew"
    )


def strategy_run(job: Job, loaded: Loaded, folder: Path, emit: Emit | None) -> Figures:
    """Runs one strategy, or continues it, and reads its figures.

    A strategy that fails, or a run that stays below its quorum, gives status "failed" with the
    reason and the figures of the rounds that stand.

    Raises:
        RunFolderError: the folder is damaged or in use.
        StorageError: the disk refused.
    """
    federation = Federation(job, loaded, emit=emit)
    if (folder / "HEAD").is_file():
        store = RunStore.open(folder, job.digest())
    else:
        store = federation.start(folder)
    reason = None
    try:
        federation.run(store)
    except CONTENDER_FAILED as e:
        reason = str(e)
    finally:
        store.close()
    log = MetricsLog(folder / "metrics.jsonl").read()
    events = [event for event in log if event["event"] == "round"]
    errors = [e["aggregation_error"] for e in events if e["aggregation_error"] is not None]
    return {
        "kind": "strategy",
        "status": "failed" if reason else "done",
        "reason": reason,
        "rounds": len(events),
        "base": next((e["eval"] for e in log if e["event"] == "start"), {}),
        "curve": _curve(job, events),
        "final": events[-1]["eval"] if events and not reason else {},
        "aggregation_error": sum(errors) / len(errors) if errors else None,
        "bytes_up": sum(e["bytes_up"] for e in events),
        "bytes_down": sum(e["bytes_down"] for e in events),
        "server_s": sum(e["seconds"]["reduce"] + e["seconds"]["refactor"] for e in events),
    }


def baseline_run(job: Job, loaded: Loaded, folder: Path, name: str, emit: Emit | None) -> Figures:
    """Runs a baseline, or continues it, and reads its figures; see `strategy_run`."""
    rounds, steps = job.federation.rounds, job.training.local_steps
    reason, final = None, {}
    points: list[tuple[int, int, Scores]] = []
    try:
        if name == "local":
            found = run_local(job, loaded, folder, emit)
            final = dict(found["mean"])
            points = [(rounds, found["steps_per_client"], final)]
        else:
            found = run_centralised(job, loaded, folder, emit)
            final = dict(found["final"])
            # in steps per client, so that one x-axis means equal local work
            points = [(p["round"], p["round"] * steps, p["eval"]) for p in found["rounds"]]
    except CONTENDER_FAILED as e:
        reason = str(e)
    return {
        "kind": "baseline",
        "status": "failed" if reason else "done",
        "reason": reason,
        "rounds": 0 if reason else rounds,
        "base": {},
        "curve": [
            {
                "round": number,
                "steps": count,
                "bytes": 0,
                "scores": dict(scores),
                "aggregation_error": None,
            }
            for number, count, scores in points
        ],
        "final": final,
        "aggregation_error": None,
        "bytes_up": 0,
        "bytes_down": 0,
        "server_s": 0.0,
    }


def _curve(job: Job, events: list[Event]) -> list[Figures]:
    sent = 0
    curve = []
    for event in events:
        number = event["round"]
        sent += event["bytes_up"] + event["bytes_down"]
        # by plan, not by what there is: an evaluation without a finite score is one
        if number % job.evaluation.every == 0 or number == job.federation.rounds:
            curve.append(
                {
                    "round": number,
                    "steps": number * job.training.local_steps,
                    "bytes": sent,
                    "scores": event["eval"],
                    "aggregation_error": event["aggregation_error"],
                }
            )
    return curve


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found
