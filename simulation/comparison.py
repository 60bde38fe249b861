"""Comparison of strategies and baselines at equal local work, over seeds.

Each run is an ordinary run folder, so that an interrupted comparison goes on where it was.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedlora.checkpoint import RunStore
from fedlora.config.job import Job
from fedlora.report.headline import headline
from fedlora.simulation.baselines import run_centralised, run_local
from fedlora.simulation.federation import Emit, Federation, Loaded, load, machine
from fedlora.simulation.metrics import MetricsLog
from fedlora.storage import write_atomic
from fedlora.wire import encode_json

Announce = Callable[[str], None]


def compare(
    job: Job,
    folder: Path,
    *,
    strategies: Sequence[str],
    baselines: Sequence[str],
    num_seeds: int,
    emit: Emit | None = None,
    announce: Announce | None = None,
) -> dict[str, Any]:
    """Runs everything that is missing in `folder` and writes comparison.json.

    Args:
        job: what all runs share.
        folder: one run folder per strategy and seed is made in it, or continued.
        strategies: names as in federation.strategy.
        baselines: "local", "centralised".
        num_seeds: seeds from run.seed up; a seed changes data division and all draws.
        emit: receives the events of every run.
        announce: told what comes next.

    Returns:
        the comparison, as written.
    """
    seeds = [job.run.seed + i for i in range(num_seeds)]
    metric = headline(job.model.task).key
    runs: list[dict[str, Any]] = []
    for seed in seeds:
        seeded = job.model_copy(update={"run": job.run.model_copy(update={"seed": seed})})
        loaded = load(seeded)
        for name in strategies:
            if announce:
                announce(f"{name}, seed {seed}")
            federation = job.federation.model_copy(update={"strategy": name})
            variant = seeded.model_copy(update={"federation": federation})
            place = folder / "runs" / f"{_safe(name)}-seed{seed}"
            runs.append(_strategy_run(variant, loaded, place, name, metric, emit))
        for name in baselines:
            if announce:
                announce(f"baseline {name}, seed {seed}")
            place = folder / "baselines" / f"{name}-seed{seed}"
            runs.append(_baseline_run(seeded, loaded, place, name, metric, emit))
    comparison = {
        "name": job.run.name,
        "metric": metric,
        "machine": machine(job.run.threads),
        "seeds": seeds,
        "rounds": job.federation.rounds,
        "steps_per_client": job.federation.rounds * job.training.local_steps,
        "runs": runs,
    }
    write_atomic(folder / "comparison.json", encode_json(comparison))
    return comparison


def _strategy_run(
    job: Job, loaded: Loaded, folder: Path, label: str, metric: str, emit: Emit | None
) -> dict[str, Any]:
    federation = Federation(job, loaded, emit=emit)
    if (folder / "HEAD").is_file():
        store = RunStore.open(folder, job.digest())
    else:
        store = federation.start(folder)
    try:
        federation.run(store)
    finally:
        store.close()
    events = [e for e in MetricsLog(folder / "metrics.jsonl").read() if e["event"] == "round"]
    steps = job.training.local_steps
    sent = 0
    curve = []
    for event in events:
        sent += event["bytes_up"] + event["bytes_down"]
        if metric in event["eval"]:
            curve.append(
                {
                    "round": event["round"],
                    "steps": event["round"] * steps,
                    "value": event["eval"][metric],
                    "bytes": sent,
                }
            )
    errors = [e["aggregation_error"] for e in events if e["aggregation_error"] is not None]
    return {
        "label": label,
        "kind": "strategy",
        "seed": job.run.seed,
        "curve": curve,
        "final": events[-1]["eval"],
        "aggregation_error": sum(errors) / len(errors) if errors else None,
        "bytes_up": sum(e["bytes_up"] for e in events),
        "bytes_down": sum(e["bytes_down"] for e in events),
        "server_s": sum(e["seconds"]["reduce"] + e["seconds"]["refactor"] for e in events),
    }


def _baseline_run(
    job: Job, loaded: Loaded, folder: Path, name: str, metric: str, emit: Emit | None
) -> dict[str, Any]:
    steps = job.training.local_steps
    if name == "local":
        found = run_local(job, loaded, folder, emit)
        final: Mapping[str, float] = found["mean"]
        total = found["steps_per_client"]
        points = [(job.federation.rounds, total, final)]
    else:
        found = run_centralised(job, loaded, folder, emit)
        final = found["final"]
        # in steps per client, so that one x-axis means equal local work
        points = [(p["round"], p["round"] * steps, p["eval"]) for p in found["rounds"]]
    return {
        "label": name,
        "kind": "baseline",
        "seed": job.run.seed,
        "curve": [
            {"round": number, "steps": count, "value": scores[metric], "bytes": 0}
            for number, count, scores in points
            if metric in scores
        ],
        "final": dict(final),
        "aggregation_error": None,
        "bytes_up": 0,
        "bytes_down": 0,
        "server_s": 0.0,
    }


def _safe(name: str) -> str:
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in name)
