"""Many small clients on one machine: one by one, together, and in Flower's own simulation.

    PYTHONPATH=. python -m benchmarks.cohort [--repeat 3] [--no-flower]

Every client of a job takes the same steps on a model with random weights. `alone` is the local
engine, `cohort` the same with run.cohort = "auto". `flower` is Flower's simulation on Ray with a
ClientApp that trains by the same function, once with the model kept in its worker processes and
once (`flower, building`) with the model loaded in the train handler, as its examples do; both
with FedAvg and one worker per core. In that comparison our engines have a thread per core.

Every measurement is a fresh process, and engines take turns. A round's seconds count from the
second round on, so that start-up counts for nobody. Writes cohort.json and cohort.md into --out.
"""

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.cohort_job import Case, job_for, prepare
from benchmarks.overhead import _reset_peak, _rss
from fedlora.models.loaded import load
from fedlora.server.machine import machine
from fedlora.simulation.federation import Federation

MIB = 2**20


def measure(case: Case, folder: Path) -> dict[str, Any]:
    """Runs a case in this process.

    Returns:
        round_s: seconds of each round's training, without the first one's.
        load_s: seconds to load model and data.
        width: clients that were trained together.
        grown: resident bytes at most, above those before round 1.
    """
    prepare(case, folder)
    if case.engine.startswith("flower"):
        # Flower and Ray take seconds to import, and other engines do without
        from benchmarks import cohort_flower

        return {"round_s": cohort_flower.rounds(case, folder)}
    job = job_for(case, folder)
    rounds: list[dict[str, Any]] = []

    def keep(event: dict[str, Any]) -> None:
        if event["event"] == "round":
            rounds.append(event)

    started = time.perf_counter()
    loaded = load(job)
    load_s = time.perf_counter() - started
    federation = Federation(job, loaded, emit=keep)
    store = federation.start(folder / "run")
    gc.collect()
    # as the command line does
    gc.freeze()
    before = _rss("VmRSS")
    _reset_peak()
    federation.run(store)
    store.close()
    return {
        "round_s": [event["seconds"]["clients"] for event in rounds[1:]],
        "load_s": load_s,
        "width": federation.width.clients,
        "grown": _rss("VmHWM") - before,
        "adapter_bytes": rounds[-1]["bytes_up"] // case.clients,
    }


def run_case(case: Case) -> dict[str, Any]:
    """Runs `case` in a fresh process and returns what it measured.

    Raises:
        RuntimeError: the process failed; with the end of its output.
    """
    with tempfile.TemporaryDirectory() as folder:
        environment = {
            **os.environ,
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_HOME": str(Path(folder) / "flwr"),
            "RAY_USAGE_STATS_ENABLED": "0",
            "OMP_NUM_THREADS": str(case.threads),
            "PYTHONPATH": str(Path(__file__).parents[1]),
        }
        command = [sys.executable, "-m", "benchmarks.cohort"]
        command += ["--case", json.dumps(asdict(case)), "--out", folder]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        output = Path(folder) / "result.json"
        if done.returncode or not output.is_file():
            raise RuntimeError(f"{case} failed:\n{(done.stdout + done.stderr)[-4000:]}")
        found: dict[str, Any] = json.loads(output.read_text())
        return found


def _child(fields: Mapping[str, Any], folder: Path) -> None:
    torch.set_num_threads(fields["threads"])
    (folder / "result.json").write_text(json.dumps(measure(Case(**fields), folder)))


# hidden width, texts of a step, tokens of a text
SIZES = ((64, 4, 16), (128, 4, 16), (128, 4, 32), (256, 4, 16), (128, 8, 32), (256, 8, 32))


def main() -> None:
    """Measures all, and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--no-flower", dest="flower", action="store_false")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--case", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.case:
        _child(json.loads(given.case), given.out)
        return
    found: dict[str, Any] = {
        "machine": machine(os.cpu_count() or 1),
        "engines": {},
        "sizes": [],
        "memory": [],
    }
    engines = ["alone", "cohort", *(["flower", "flower, building"] if given.flower else [])]
    for _ in range(given.repeat):
        for engine in engines:
            case = Case(engine, threads=os.cpu_count() or 1)
            seconds = statistics.median(run_case(case)["round_s"])
            found["engines"].setdefault(engine, []).append(seconds)
            print(f"{engine}: {seconds:.2f} s a round", flush=True)
    for hidden, batch, tokens in SIZES:
        row: dict[str, Any] = {"hidden": hidden, "batch": batch, "tokens": tokens, "ratios": []}
        for _ in range(given.repeat):
            size = {"hidden": hidden, "batch": batch, "tokens": tokens, "steps": 4}
            alone, cohort = (run_case(Case(engine, **size)) for engine in ("alone", "cohort"))
            row["width"] = cohort["width"]
            row["ratios"].append(
                statistics.median(alone["round_s"]) / statistics.median(cohort["round_s"])
            )
        print(row, flush=True)
        found["sizes"].append(row)
    for clients in (1, 16, 64):
        result = run_case(Case("cohort", clients=clients, steps=2, rounds=2))
        found["memory"].append({"clients": clients, **result})
        print(clients, result, flush=True)
    (given.out / "cohort.json").write_text(json.dumps(found, indent=1) + "\n")
    (given.out / "cohort.md").write_text(page(found))


def page(found: Mapping[str, Any]) -> str:
    """The results as markdown."""
    cohort = statistics.median(found["engines"]["cohort"])
    out = [
        "# Many small clients on one machine",
        "",
        "`PYTHONPATH=. python -m benchmarks.cohort`, see there for what is measured: 16 clients, "
        "4 layers, LoRA of rank 8 on every linear layer, 10 steps a round.",
        "",
        f"Machine: {found['machine']}.",
        "",
        "Hidden width 128, 64 tokens of every client in a step; median (range) of the runs.",
        "",
        "| engine | s a round | times the cohort's |",
        "| --- | ---: | ---: |",
    ]
    for engine, seconds in found["engines"].items():
        middle = statistics.median(seconds)
        out.append(
            f"| {engine} | {middle:.2f} ({min(seconds):.2f} to {max(seconds):.2f}) | "
            f"{middle / cohort:.2f} |"
        )
    ratios = {
        engine: statistics.median(seconds) / cohort for engine, seconds in found["engines"].items()
    }
    demands = {"alone": 2.0, "flower": 3.0, "flower, building": 10.0}
    out += [""]
    for engine, demand in demands.items():
        if engine in ratios:
            word = "met" if ratios[engine] >= demand else "**missed**"
            out.append(f"- {engine}: at least {demand:g} times the cohort's is {word}")
    out += ["", 'run.cohort = "auto" against "off", by size (how many are trained together):', ""]
    out += [
        "| hidden | texts x tokens | together | times as fast |",
        "| ---: | ---: | ---: | ---: |",
    ]
    for row in found["sizes"]:
        ratios = row["ratios"]
        out.append(
            f"| {row['hidden']} | {row['batch']} x {row['tokens']} | {row['width']} | "
            f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) |"
        )
    out += [
        "",
        "With 1 together both are the same code, and the ratio is the machine's noise.",
        "",
        "Memory of the process above what it held before round 1. Adapters with gradients and two "
        "moments are four times the last column; the rest is activations of one pass:",
        "",
    ]
    out += ["| clients | MiB | adapters, MiB |", "| ---: | ---: | ---: |"]
    for row in found["memory"]:
        own = row["clients"] * row["adapter_bytes"] / MIB
        out.append(f"| {row['clients']} | {row['grown'] / MIB:.0f} | {own:.1f} |")
    return "\n".join([*out, ""])


if __name__ == "__main__":
    main()
