"""The campaign of kills through Flower: what it did, what came out, and how long it took.

    PYTHONPATH=. python benchmarks/faults.py [--repetitions 5] [--targets worker exchange]

Every trial is added to benchmarks/results/faults.json as soon as it is over, and the page is made
from that file, so a campaign can be done in pieces.
"""

import argparse
import json
import random
import tempfile
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from fedlora.server.machine import machine
from tests.faults.nemesis import ROUNDS, TARGETS, Nemesis

BAR_S = 30.0
RESULTS = Path("benchmarks/results")


def main() -> None:
    """Runs the campaign and writes both files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--targets", nargs="*", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    path = options.out / "faults.json"
    found = json.loads(path.read_text()) if path.is_file() else {"trials": []}
    found["machine"] = machine(1)
    with tempfile.TemporaryDirectory() as name, Nemesis(Path(name)) as nemesis:
        trials = [nemesis.undisturbed()]
        _keep(path, found, trials[0])
        for number in range(options.repetitions):
            for target in options.targets:
                chance = random.Random(f"{options.seed} {target} {number}")
                trial = nemesis.trial(target, [TARGETS[target]], chance)
                print(trial, flush=True)
                if not trial.passed:
                    print(nemesis.deployed.logs(), flush=True)
                _keep(path, found, trial)
    (options.out / "faults.md").write_text(page(found), "utf-8")


def _keep(path: Path, found: dict[str, Any], trial: Any) -> None:
    found["trials"].append({**asdict(trial), "passed": trial.passed})
    path.write_text(json.dumps(found, indent=1) + "\n", "utf-8")


def page(found: dict[str, Any]) -> str:
    """The table of a campaign."""
    trials = found["trials"]
    rows = []
    for target in ["none", *TARGETS]:
        own = [trial for trial in trials if trial["target"] == target]
        if not own:
            continue
        waits = [wait for trial in own for wait in trial["recovery_s"]]
        recovery = f"{median(waits):.1f} | {max(waits):.1f}" if waits else "| "
        rows.append(
            f"| {target} | {len(own)} | {sum(trial['kills'] for trial in own)} | "
            f"{sum(not trial['passed'] for trial in own)} | {recovery} |"
        )
    waits = [wait for trial in trials for wait in trial["recovery_s"]]
    within = sum(wait <= BAR_S for wait in waits)
    clean = median(trial["seconds"] for trial in trials if trial["target"] == "none")
    return f"""# kill -9 of every process of a deployed federation

    PYTHONPATH=. python benchmarks/faults.py

One server and two clients in processes of their own on one machine, mutual TLS, {ROUNDS} rounds of
the smallest model; one kill per run, at a time uniform over the length of an undisturbed run (median
{clean:.0f} s), or as soon after it as the process runs. A run fails when `fedlora run` does not end
with 0, when the final adapter is not that of a simulation, bit for bit, when an acknowledged round
or update is lost, or when a client counts twice in a round. The time is that from the kill to the
next committed round; {within} of {len(waits)} are within {BAR_S:.0f} s. Kills after which no round was
left to be committed have no such time.

| killed | runs | kills | failed runs | median s | longest s |
| --- | ---: | ---: | ---: | ---: | ---: |
{chr(10).join(rows)}

Machine: {", ".join(f"{key} {value}" for key, value in found["machine"].items())}.
"""


if __name__ == "__main__":
    main()
