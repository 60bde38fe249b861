"""The campaign of kills through Flower: what it did, what came out, and how long it took.

    PYTHONPATH=. python benchmarks/faults.py [--repetitions 5] [--seed 0]

Every trial is added to benchmarks/results/faults.json as soon as it is over, and the page is made
from that file, so a campaign can be done in pieces.
"""

import argparse
import json
import os
import random
import tempfile
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from fedlora.server.machine import machine
from tests.faults.nemesis import GROUPS, ROUNDS, TARGETS, Nemesis, Trial

BAR_S = 30.0


def main() -> None:
    """Runs the campaign and writes both files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    path = options.out / "faults.json"
    found = json.loads(path.read_text()) if path.is_file() else {"trials": []}
    found["machine"] = machine(1)
    with tempfile.TemporaryDirectory() as name, Nemesis(Path(name)) as nemesis:
        _keep(path, found, nemesis.undisturbed())
        for number in range(options.seed, options.seed + options.repetitions):
            for group in GROUPS:
                trial = nemesis.trial(group, random.Random(f"{number} {group}"))
                print(trial, flush=True)
                if not trial.passed:
                    print(nemesis.deployed.logs(), flush=True)
                _keep(path, found, trial)
                (options.out / "faults.md").write_text(page(found), "utf-8")


def _keep(path: Path, found: dict[str, Any], trial: Trial) -> None:
    found["trials"].append({**asdict(trial), "passed": trial.passed, "load": os.getloadavg()[0]})
    path.write_text(json.dumps(found, indent=1) + "\n", "utf-8")


def page(found: dict[str, Any]) -> str:
    """The table of a campaign."""
    trials = found["trials"]
    rows = []
    for target in TARGETS:
        own = [kill for trial in trials for kill in trial["kills"] if kill["target"] == target]
        failed = [
            trial
            for trial in trials
            if not trial["passed"] and target in {kill["target"] for kill in trial["kills"]}
        ]
        waits = _waits(own)
        recovery = f"{median(waits):.0f} | {max(waits):.0f}" if waits else "| "
        rows.append(f"| {target} | {len(own)} | {len(failed)} | {len(waits)} | {recovery} |")
    disturbed = [trial for trial in trials if trial["kills"]]
    waits = _waits(kill for trial in disturbed for kill in trial["kills"])
    within = sum(wait <= BAR_S for wait in waits)
    clean = [trial["seconds"] for trial in trials if not trial["kills"]]
    loads = [trial["load"] for trial in trials]
    return f"""# kill -9 of every process of a deployed federation

    PYTHONPATH=. python benchmarks/faults.py

One server and two clients in processes of their own on one machine, mutual TLS, {ROUNDS} rounds of
the smallest model. In every run three processes are killed, each at a time uniform over the
length of an undisturbed run ({median(clean):.0f} s), or as soon after it as the process runs.
A run fails when `fedlora run` does not end with 0, when the adapter of any round is not that of a
simulation, bit for bit, when an acknowledged round or update is lost, or when a client counts
twice in a round: the harness writes down every rename and link that makes one durable, and
compares the two afterwards.

{len(disturbed)} runs, {sum(not trial["passed"] for trial in disturbed)} failed.

| killed | kills | failed runs | timed | median s | longest s |
| --- | ---: | ---: | ---: | ---: | ---: |
{chr(10).join(rows)}

The times are those from a kill to the next committed round, where one was left and nothing else
was killed before it; {within} of {len(waits)} are within {BAR_S:.0f} s.
The machine has {os.cpu_count()} cores, and its load was {min(loads):.0f} to {max(loads):.0f}
(runnable processes, of which this campaign has about 2): times are those of a busy machine.

Machine: {", ".join(f"{key} {value}" for key, value in found["machine"].items())}.
"""


def _waits(kills: Iterable[dict[str, Any]]) -> list[float]:
    return [kill["recovery_s"] for kill in kills if kill["recovery_s"] is not None]


if __name__ == "__main__":
    main()
