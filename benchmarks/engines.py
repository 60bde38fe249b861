"""The engines of a simulation side by side: local, Ray, and Flower's own Ray simulation.

    python benchmarks/engines.py

Two jobs on the builtin model with generated rows: one in which no client takes a step, so that
only the engine is measured, and one in which clients train. Both engines do the whole client:
decode and check the broadcast, put it into the model, train, encode; the server admits, merges
and commits. They must end in the same adapter, or the benchmark fails. Flower's half is that of
overhead.py (a ClientApp that returns what it got, FedAvg), with an update of about the same size.

Every measurement is a fresh process, and the engines take turns: on a machine shared with others
only the ratios within one run mean anything. Rates count from the end of round 1, so that starting
Ray and loading the model in its workers count for neither side. Memory is the peak resident
set of the server's process above what it held before round 1.

Needs the extra `ray`. Writes engines.json and engines.md into --out.
"""

import argparse
import csv
import gc
import importlib.util
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from fedlora.config.job import Job
from fedlora.models.loaded import load
from fedlora.server.machine import machine
from fedlora.simulation.federation import Federation

ROWS = 4  # of each client
MIB = 2**20


@dataclass(frozen=True)
class Case:
    """One measurement in a process of its own."""

    engine: str
    clients: int
    steps: int
    rounds: int
    workers: int


def job_for(case: Case, folder: Path) -> Job:
    """A job with `case.clients` clients of a few rows each, written into `folder`."""
    rows = folder / "rows.csv"
    with rows.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        for i in range(ROWS * case.clients):
            label = ("good", "bad")[i % 2]
            writer.writerow([f"a {label} row, number {i}", label])
    return Job.model_validate(
        {
            "model": {"task": "sequence-classification"},
            "data": {"source": str(rows), "max_length": 32, "max_validation": 1},
            "partition": {"clients": case.clients},
            "adapter": {"rank": 8, "targets": ["q_proj", "v_proj"]},
            "training": {"local_steps": case.steps, "batch_size": 4},
            "federation": {"rounds": case.rounds},
            # scores are no part of an engine; the last round's are not counted
            "evaluation": {"every": case.rounds, "batch_size": 64},
            "run": {"engine": case.engine},
        }
    )


def measure(case: Case, folder: Path) -> dict[str, Any]:
    """Runs a job in this process.

    Returns:
        round_s: seconds of each round until its replies were in, without the first one.
        before, peak: resident bytes of this process before round 1, and at most.
        payload_bytes: bytes up of one client in one round.
        adapter_sha256: of the last round.
    """
    overhead = _overhead()
    job = job_for(case, folder)
    loaded = load(job)
    rounds: list[dict[str, Any]] = []

    def keep(event: dict[str, Any]) -> None:
        if event["event"] == "rejected":
            raise AssertionError(event)
        if event["event"] == "round":
            rounds.append(event)

    federation = Federation(job, loaded, emit=keep)
    store = federation.start(folder / "run")
    gc.collect()
    before = overhead._rss("VmRSS")
    overhead._reset_peak()
    federation.run(store)
    peak = overhead._rss("VmHWM")
    store.close()
    return {
        "round_s": [event["seconds"]["clients"] for event in rounds[1:]],
        "before": before,
        "peak": peak,
        "payload_bytes": rounds[-1]["bytes_up"] // case.clients,
        "adapter_sha256": rounds[-1]["adapter_sha256"],
    }


def flower(case: Case) -> dict[str, Any]:
    """Flower's simulation of the case without training."""
    overhead = _overhead()
    size = overhead.Size(layers=8, width=128, rank=8)
    ends = overhead.flower_rounds(size, case.clients, case.rounds, case.workers)["ends"]
    return {"round_s": [b - a for a, b in itertools.pairwise(ends)]}


def _overhead() -> ModuleType:
    # by path: an installed distribution may own the name `benchmarks`
    path = Path(__file__).with_name("overhead.py")
    spec = importlib.util.spec_from_file_location("overhead_benchmark", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def run_case(case: Case) -> dict[str, Any]:
    """Runs `case` in a fresh process and returns what it measured.

    Raises:
        RuntimeError: the process failed; with the end of its output.
    """
    with tempfile.TemporaryDirectory() as folder:
        environment = {
            **os.environ,
            "FEDLORA_RAY_WORKERS": str(case.workers),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_HOME": str(Path(folder) / "flwr"),
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        command = [sys.executable, __file__, "--case", json.dumps(asdict(case)), "--out", folder]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        output = Path(folder) / "result.json"
        if done.returncode or not output.is_file():
            raise RuntimeError(f"{case} failed:\n{(done.stdout + done.stderr)[-4000:]}")
        found: dict[str, Any] = json.loads(output.read_text())
        return found


def _child(fields: Mapping[str, Any], folder: Path) -> None:
    torch.set_num_threads(1)
    case = Case(**fields)
    found = flower(case) if case.engine == "flower" else measure(case, folder)
    (folder / "result.json").write_text(json.dumps(found))


def rates(options: argparse.Namespace, steps: int, rounds: int) -> dict[str, Any]:
    """Client-updates per second of every engine, each run in turn."""
    engines = ["local", "ray", *(["flower"] if not steps and options.flower else [])]
    found: dict[str, list[float]] = {engine: [] for engine in engines}
    digests = set()
    for _ in range(options.repeat):
        for engine in engines:
            case = Case(engine, options.clients, steps, rounds, options.workers)
            result = run_case(case)
            digests |= {result.get("adapter_sha256")} - {None}
            found[engine].append(options.clients / statistics.median(result["round_s"]))
            print(
                f"{steps} steps, {engine:6} {found[engine][-1]:8.1f} client-updates/s", flush=True
            )
    if len(digests) != 1:
        raise AssertionError(f"the engines ended in different adapters: {digests}")
    return {"steps": steps, "rounds": rounds, "updates_per_s": found}


def memory(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The server's resident set with few and many clients."""
    found = []
    for clients in options.memory:
        for engine in ("local", "ray"):
            result = run_case(Case(engine, clients, 0, 2, options.workers))
            row = {key: result[key] for key in ("before", "peak", "payload_bytes")}
            found.append({"engine": engine, "clients": clients, **row})
            grown = (row["peak"] - row["before"]) / MIB
            print(f"{clients} clients, {engine}: {grown:+.1f} MiB", flush=True)
    return found


def report(found: Mapping[str, Any]) -> str:
    """engines.md: the tables, the machine and the command."""
    here = found["machine"]
    lines = [
        "# Engines of a simulation",
        "",
        f"    {found['command']}",
        "",
        f"{here['processor']}, {here['cores']} cores, {here['system']}; Python {here['python']}, "
        f"torch {here['torch']}, Ray {here['ray']}, {found['workers']} Ray workers of one thread. "
        f"Load average {found['load'][0]} before the first run and {found['load'][1]} after the "
        f"last, so rates are lower bounds; ratios are of runs that took turns.",
        "",
        f"{found['clients']} clients a round. Rate: clients over the median of the seconds that a "
        "round after the first waited for its updates. Both engines ended in the same adapter, "
        "bit for bit. Flower's clients return what they got, without a model.",
        "",
        "| job | engine | client-updates/s, median | lowest | highest | to local |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for job in found["jobs"]:
        name = f"{job['steps']} steps a client" if job["steps"] else "no training"
        base = statistics.median(job["updates_per_s"]["local"])
        for engine, values in job["updates_per_s"].items():
            median = statistics.median(values)
            lines.append(
                f"| {name} | {engine} | {median:.1f} | {min(values):.1f} | {max(values):.1f} | "
                f"{median / base:.2f} |"
            )
    lines += [
        "",
        "## Memory",
        "",
        "Resident set of the server's process, two rounds without training.",
        "",
        "| engine | clients | all updates, MiB | before round 1, MiB | above it at most, MiB |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for row in found["memory"]:
        lines.append(
            f"| {row['engine']} | {row['clients']} | "
            f"{row['clients'] * row['payload_bytes'] / MIB:.0f} | {row['before'] / MIB:.0f} | "
            f"{(row['peak'] - row['before']) / MIB:.0f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--clients", type=int, default=40, help="clients a round, for the rates")
    add("--workers", type=int, default=2, help="Ray workers")
    add("--steps", type=int, default=20, help="local steps of the job that trains")
    add("--repeat", type=int, default=3, help="runs of each engine")
    add("--memory", type=int, nargs="*", default=[100, 1000], help="clients, for memory")
    add("--no-flower", dest="flower", action="store_false", help="leave Flower out")
    add("--out", type=Path, default=Path(__file__).parent / "results", help="folder of results")
    add("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        _child(json.loads(options.case), options.out)
        return
    load_before = os.getloadavg()[0]
    jobs = [rates(options, 0, 8), rates(options, options.steps, 4)]
    found = {
        "command": " ".join(["python benchmarks/engines.py", *sys.argv[1:]]),
        "machine": {**machine(1), "cores": os.cpu_count(), "ray": version("ray")},
        "clients": options.clients,
        "workers": options.workers,
        "jobs": jobs,
        "memory": memory(options),
        "load": [round(load_before, 1), round(os.getloadavg()[0], 1)],
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "engines.json").write_text(json.dumps(found, indent=2) + "\n")
    text = report(found)
    (options.out / "engines.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
