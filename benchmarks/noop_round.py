"""What a round costs when there is nothing to do: two clients, TLS, no local steps.

    python -m benchmarks.noop_round [--rounds 12]

Server, clients and their processes run on this machine, as `fedlora server` and
`fedlora client` start them, with Flower's supported settings. A round lasts from one commit to
the next; the first one, which loads models, is left out. Writes results/noop_round.{json,md}.
"""

import argparse
import itertools
import json
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from fedlora.config.job import Job
from fedlora.server.machine import machine
from fedlora.server.run_events import FollowedFolders
from tests.deployed.federation import Deployed, write_job

RESULTS = Path(__file__).parent / "results"
CLIENTS = 2


def measure(rounds: int) -> dict[str, Any]:
    """Seconds of each round, and of its stages."""
    job = Job.model_validate(
        {
            "partition": {"clients": CLIENTS},
            "training": {"local_steps": 0},
            "federation": {"rounds": rounds + 1, "deadline_s": 300.0},
            "evaluation": {"every": 1000},
        }
    )
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        path = write_job(folder / "job.toml", job)
        names = {f"client-{k:03d}": ["--partition", k] for k in range(CLIENTS)}
        with Deployed(folder, names) as deployed:
            run = deployed.run(path, folder / "out", "--detach").stdout.strip()
            return follow(folder / "server" / "runs", run)


def follow(runs: Path, run: str) -> dict[str, Any]:
    """Reads the run's events as they come."""
    at: list[float] = []
    stages: list[dict[str, float]] = []
    for line in FollowedFolders(runs).follow(run, 0, threading.Event()):
        event = json.loads(line.json)
        if event["event"] == "failed":
            raise SystemExit(event["why"])
        if event["event"] == "round":
            at.append(time.perf_counter())
            stages.append(event["seconds"])
    # the last round also evaluates
    seconds = [later - earlier for earlier, later in itertools.pairwise(at)][:-1]
    return {"seconds": seconds, "stages": stages[1:-1]}


def report(found: dict[str, Any]) -> str:
    """The table, in Markdown."""
    seconds = found["seconds"]
    names = list(found["stages"][0])
    medians = {n: statistics.median(s[n] for s in found["stages"]) for n in names}
    rest = statistics.median(seconds) - sum(medians.values())
    rows = [f"| {name} | {value:.3f} |" for name, value in medians.items()]
    about = found["machine"]
    return "\n".join(
        [
            "# A round with nothing to do",
            "",
            f"{CLIENTS} clients, TLS, no local steps; {len(seconds)} rounds in a row on "
            f"{about['processor']} ({about['system']}), load {found['load']}.",
            "",
            f"Median **{statistics.median(seconds):.2f} s** "
            f"({min(seconds):.2f} to {max(seconds):.2f}).",
            "",
            "| stage | median s |",
            "| --- | --- |",
            *rows,
            f"| commit, and what is between rounds | {rest:.3f} |",
            "",
            "`clients` is the way to the clients and back: a SuperNode that found nothing sleeps "
            "for 3 s before it looks again, and a ClientApp starts as a process of its own for "
            "every message.",
            "",
        ]
    )


def main() -> None:
    """Measures and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=12)
    options = parser.parse_args()
    found = measure(options.rounds)
    found["machine"] = machine(1)
    found["load"] = Path("/proc/loadavg").read_text().split()[0]
    (RESULTS / "noop_round.json").write_text(json.dumps(found, indent=1) + "\n")
    text = report(found)
    (RESULTS / "noop_round.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
