"""Runs strategies on the vision benchmark and appends one line per run to a results file.

    PYTHONPATH=. python -m benchmarks.vision.run tune  --settings V1 --arms fedit ffa-lora
    PYTHONPATH=. python -m benchmarks.vision.run score --settings V1 --arms fedit ffa-lora

`tune` tries every learning rate of the grid on a seed that is not scored (100, or --seeds);
`score` runs seeds 0 to 4 at the rate that was best there. What the file already holds is not
run again, so both can be interrupted, and processes with different seeds, settings or arms can
share a file. An arm is `strategy[:option=value;...][+wrapper...]`.
"""

import argparse
import itertools
import json
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.vision.prepare import DOMAINS, TEST, prepare
from benchmarks.vision.settings import FIRST_TUNING_SEED, GRID, SETTINGS, Arm, Setting, make_job
from fedlora.config.job import Job
from fedlora.errors import RunFailed
from fedlora.models.loaded import Loaded, load
from fedlora.server.journal import Event
from fedlora.simulation.federation import Federation

ROOT = Path(__file__).parents[2]
Line = dict[str, Any]


class Results:
    """The results file: one JSON object per run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def lines(self) -> list[Line]:
        """All whole lines; an interrupted write leaves a half one, which does not count."""
        if not self.path.is_file():
            return []
        return list(_whole(self.path.read_text("utf-8").splitlines()))

    def has(self, setting: str, arm: str, rate: float, seed: int) -> bool:
        """The run has been done."""
        return any(
            (line["setting"], line["arm"], line["rate"], line["seed"]) == (setting, arm, rate, seed)
            for line in self.lines()
        )

    def append(self, line: Line) -> None:
        """One more run; a single write, so that processes can share the file."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab+") as file:
            text = json.dumps(line, sort_keys=True).encode() + b"\n"
            if file.tell():
                file.seek(-1, 2)
                text = text if file.read(1) == b"\n" else b"\n" + text
            file.write(text)


def is_tuning(line: Line) -> bool:
    """The run's seed is one that chooses learning rates."""
    return bool(line["seed"] >= FIRST_TUNING_SEED)


def best_rate(lines: Sequence[Line], setting: str, arm: str) -> float | None:
    """The learning rate with the highest mean accuracy over tuning seeds; None without any.

    A failed run counts as none right. Rates that were tried on fewer seeds do not count.
    """
    tried: dict[float, list[float]] = {}
    for line in lines:
        if (line["setting"], line["arm"]) == (setting, arm) and is_tuning(line):
            tried.setdefault(line["rate"], []).append(line["accuracy"] or 0.0)
    most = max((len(values) for values in tried.values()), default=0)
    means = {rate: fmean(values) for rate, values in tried.items() if len(values) == most}
    return max(means, key=means.__getitem__) if means else None


def measure(job: Job, loaded: Loaded, folder: Path) -> Line:
    """One run and its figures.

    Args:
        job: as from `make_job`.
        loaded: model and data of its setting and seed.
        folder: where the run folder is made.

    Returns:
        accuracy (mean over domains, after the last round) and its "domains"; auc, the mean
        accuracy over all rounds from 0; aggregation_error, mean over rounds; bytes_up and
        bytes_down; server_s (reduce and refactor), wall_s and cpu_s of the whole run. Accuracies
        are None where the run failed, and `failed` says why.
    """
    events: list[Event] = []
    started, worked = time.perf_counter(), time.process_time()
    federation = Federation(job, loaded, emit=events.append)
    store = federation.start(folder)
    failed, domains = None, {}
    try:
        state = federation.run(store)
        federation.hold(federation.strategy.global_delta(state))
        # test rows are in order of domain, TEST of each
        test = loaded.data.test
        for place, domain in enumerate(DOMAINS):
            part = test[place * TEST : (place + 1) * TEST]
            domains[domain] = round(federation.scores(part)["accuracy"], 6)
    except RunFailed as e:
        failed = str(e)
    finally:
        store.close()
    rounds = [event for event in events if event["event"] == "round"]
    errors = [e["aggregation_error"] for e in rounds if e["aggregation_error"] is not None]
    scored = [e for e in events if e["event"] in ("start", "round") and e["eval"]]
    curve = [[e["round"], round(e["eval"]["accuracy"], 6)] for e in scored]
    return {
        "accuracy": None if failed else fmean(domains.values()),
        "domains": domains,
        "curve": curve,
        "auc": None if failed else area(curve),
        "aggregation_error": fmean(errors) if errors else None,
        "bytes_up": sum(e["bytes_up"] for e in rounds),
        "bytes_down": sum(e["bytes_down"] for e in rounds),
        "server_s": sum(e["seconds"]["reduce"] + e["seconds"]["refactor"] for e in rounds),
        "wall_s": time.perf_counter() - started,
        "cpu_s": time.process_time() - worked,
        "failed": failed,
    }


def area(curve: Sequence[Sequence[float]]) -> float:
    """Area under (round, accuracy) by trapezoids, divided by the rounds it spans."""
    parts = [
        (right[0] - left[0]) * (left[1] + right[1]) / 2 for left, right in itertools.pairwise(curve)
    ]
    return sum(parts) / (curve[-1][0] - curve[0][0])


def campaign(
    results: Results,
    work: Path,
    name: str,
    setting: Setting,
    runs: Sequence[tuple[Arm, float]],
    seed: int,
    threads: int,
) -> None:
    """Does the missing ones of `runs` with one model and one reading of the data."""
    missing = [(arm, rate) for arm, rate in runs if not results.has(name, arm.label, rate, seed)]
    if not missing:
        return
    place = prepare(work, seed)
    loaded = None
    starts = set()
    for arm, rate in missing:
        job = make_job(setting, arm, place, rate=rate, seed=seed, threads=threads)
        loaded = loaded or load(job)
        # in memory where there is such a folder: a run folder syncs every round to disk
        memory = Path("/dev/shm")
        with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as scratch:
            found = measure(job, loaded, Path(scratch) / "run")
        starts.add(found["curve"][0][1])
        assert len(starts) == 1, f"{arm.label}: a run before it has left the shared model changed"
        line = {
            "setting": name,
            "arm": arm.label,
            "strategy": arm.strategy,
            "options": dict(arm.options),
            "wrappers": list(arm.wrappers),
            "rate": rate,
            "seed": seed,
            **found,
            "commit": commit(),
        }
        results.append(line)
        figure = "failed" if found["failed"] else f"{found['accuracy']:.4f}"
        where = f"{name} {arm.label} rate {rate} seed {seed}"
        print(f"{where}: {figure}, {found['wall_s']:.1f} s", flush=True)


def commit() -> str:
    """The commit that is measured, marked where files differ from it."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs what the command line asks for and the results file lacks."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("mode", choices=("tune", "score"))
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=["V1"])
    parser.add_argument("--arms", nargs="+", required=True, type=Arm.parse)
    parser.add_argument(
        "--seeds", nargs="+", type=int, help="default: 100 to tune, 0 to 4 to score"
    )
    parser.add_argument(
        "--rates", nargs="+", type=float, help="instead of the grid, or of the tuned rate"
    )
    parser.add_argument("--results", type=Path, default=Path("runs/vision/results.jsonl"))
    parser.add_argument("--work", type=Path, default=Path("runs/vision"), help="data and models")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    tune = options.mode == "tune"
    seeds = options.seeds or ([FIRST_TUNING_SEED] if tune else range(5))
    if any((seed >= FIRST_TUNING_SEED) != tune for seed in seeds):
        parser.error(f"seeds from {FIRST_TUNING_SEED} on are for tune, those below for score")
    results = Results(options.results)
    for name in options.settings:
        rates = {}
        for arm in options.arms:
            best = best_rate(results.lines(), name, arm.label)
            rates[arm.label] = options.rates or ([] if best is None else [best])
            if tune:
                rates[arm.label] = options.rates or GRID
            if not rates[arm.label]:
                parser.error(f"{arm.label} has no rate on {name}: run tune, or give --rates")
        for seed in seeds:
            runs = [(arm, rate) for arm in options.arms for rate in rates[arm.label]]
            campaign(results, options.work, name, SETTINGS[name], runs, seed, options.threads)


def _whole(texts: Sequence[str]) -> Iterator[Line]:
    for text in texts:
        try:
            yield json.loads(text)
        except ValueError:
            continue


if __name__ == "__main__":
    main()
