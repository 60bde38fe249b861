"""What a resident worker saves: the first call, and those that follow.

    python -m benchmarks.worker --out benchmarks/results

A worker in a process of its own is called over its socket, as the ClientApp does, with the
rounds of a recorded simulation, parts and payload in the call. Cold is the first call after the
process is ready: model and data are loaded. Warm are the calls of the rounds that follow. The
time is the caller's, from the call to the event of the first training step. Every answer must
have the bytes of the simulation. A client without a resident worker pays process start and cold
call in every round.

Besides the builtin model, --model FOLDER measures a sequence classifier on 200 generated texts.
"""

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from fedlora.client.worker_call import WorkerCall
from fedlora.config.job import Job
from fedlora.protos.worker_pb2 import PartChunk, WorkMessage
from fedlora.protos.worker_pb2_grpc import WorkerStub
from fedlora.server.machine import machine
from tests.client.recorded import Exchanged, of, record

BAR_S = 1.0
CHUNK = 1 << 20


@dataclass(frozen=True)
class Figures:
    """Seconds: of the process's start, and from a call to its first training step."""

    name: str
    start: float
    cold: float
    warm: list[float]
    memory_mib: float

    @property
    def warm_median(self) -> float:
        return statistics.median(self.warm)


def builtin_job(rounds: int) -> Job:
    return Job.model_validate(
        {
            "partition": {"kind": "natural", "clients": 2},
            "training": {"local_steps": 2},
            "federation": {"rounds": rounds},
        }
    )


def encoder_job(model: str, folder: Path, rounds: int) -> Job:
    path = folder / "rows.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["text", "label"])
        rows.writerows([f"the {n % 7} of {n} is {n % 11}", f"class {n % 5}"] for n in range(200))
    return Job.model_validate(
        {
            "model": {"name": model, "task": "sequence-classification"},
            "data": {"source": str(path)},
            "partition": {"clients": 2},
            "training": {"local_steps": 2},
            "federation": {"rounds": rounds},
        }
    )


def first_step(path: Path, item: Exchanged) -> float:
    """Seconds from the call to its first training step; the answer is checked."""
    messages = [WorkMessage(header=item.header())]
    for digest, data in item.parts.items():
        for start in range(0, len(data), CHUNK):
            chunk = PartChunk(sha256=digest, chunk=data[start : start + CHUNK])
            messages.append(WorkMessage(part=chunk))
    begun, found, payload = 0.0, b"", b""
    with WorkerCall(path, 60.0) as call:
        call.status(60.0)
        stub: WorkerStub = call.stub
        started = time.perf_counter()
        for event in stub.Work(iter(messages)):
            if event.progress.stage == "training" and not begun:
                begun = time.perf_counter() - started
            payload += event.payload
            found = event.done.manifest or found
    assert (found, payload) == (item.update, item.payload), "other bytes than the simulation"
    return begun


def measure(name: str, job: Job, folder: Path) -> Figures:
    recorded = record(job, folder / "run")
    client = recorded[0].client
    items = of(recorded, client)
    path = folder / "w.sock"
    command = [sys.executable, "-m", "fedlora.client.worker_process", "--name", client]
    command += ["--socket", str(path), "--state", str(folder / "state"), "--partition", "0"]
    started = time.perf_counter()
    worker = subprocess.Popen(command, stdout=subprocess.PIPE)
    try:
        assert worker.stdout is not None
        worker.stdout.readline()
        ready = time.perf_counter() - started
        cold = first_step(path, items[0])
        warm = [first_step(path, item) for item in items[1:]]
        with WorkerCall(path, 60.0) as call:
            memory = call.status(60.0).memory_bytes / 2**20
    finally:
        worker.terminate()
        worker.wait()
    return Figures(name, ready, cold, warm, memory)


def table(found: list[Figures], facts: dict[str, Any]) -> str:
    lines = [
        "# The resident worker: seconds from a call to its first training step",
        "",
        f"`python -m benchmarks.worker` on {facts}",
        "",
        "| model | process start s | cold call s | warm calls s, median (range) | resident MiB |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in found:
        spread = f"{row.warm_median:.3f} ({min(row.warm):.3f}-{max(row.warm):.3f})"
        lines.append(
            f"| {row.name} | {row.start:.1f} | {row.cold:.2f} | {spread} | {row.memory_mib:.0f} |"
        )
    kept = all(row.warm_median < BAR_S for row in found)
    lines += ["", f"Bar: a warm call trains within {BAR_S:g} s: {'kept' if kept else 'missed'}."]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="folder of an encoder")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    facts = {**machine(1), "load_average": round(os.getloadavg()[0], 1)}
    found = []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "builtin"
        folder.mkdir()
        found.append(measure("builtin:tiny-llama", builtin_job(options.rounds), folder))
        if options.model:
            folder = Path(place) / "encoder"
            folder.mkdir()
            job = encoder_job(options.model, folder, options.rounds)
            found.append(measure("/".join(Path(options.model).parts[-2:]), job, folder))
    rows = [{**asdict(row), "warm_median": row.warm_median} for row in found]
    (options.out / "worker.json").write_text(json.dumps({**facts, "rows": rows}, indent=2) + "\n")
    (options.out / "worker.md").write_text(table(found, facts))
    print(table(found, facts))


if __name__ == "__main__":
    main()
