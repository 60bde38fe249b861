"""Comparison of contenders and baselines over levels of skew and seeds.

Each run is an ordinary run folder, so that an interrupted comparison goes on where it was.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from fedlora.config.job import Job
from fedlora.errors import ConfigError, RunFolderError
from fedlora.models.loaded import Loaded, load
from fedlora.report.comparison import FORMAT, parse_comparison, skew_text
from fedlora.report.comparison_csv import summary_rows
from fedlora.report.headline import headline
from fedlora.server.machine import machine
from fedlora.server.run import Emit
from fedlora.simulation.contenders import (
    Contender,
    check_skews,
    contender_jobs,
    placed,
    run_name,
)
from fedlora.simulation.engine import check_engine
from fedlora.simulation.federation import Federation
from fedlora.simulation.measured import baseline_run, check_folder, strategy_run
from fedlora.storage import write_atomic
from fedlora.wire import encode_json

Announce = Callable[[str], None]
Equal = Literal["rounds", "bytes"]


def compare(
    job: Job,
    folder: Path,
    *,
    contenders: Sequence[Contender],
    baselines: Sequence[str] = (),
    num_seeds: int = 1,
    skews: Sequence[float] = (),
    equal: Equal = "rounds",
    emit: Emit | None = None,
    announce: Announce | None = None,
) -> dict[str, Any]:
    """Runs everything that is missing in `folder` and writes comparison.json.

    A contender whose strategy fails, or which stays below its quorum, is recorded as failed,
    and the others go on.

    Args:
        job: what all runs share.
        folder: one run folder per contender, level and seed is made in it, or continued.
        contenders: what is compared; the first one is what differences are taken to.
        baselines: "local", "centralised".
        num_seeds: seeds from run.seed up; a seed changes data division and all draws.
        skews: Dirichlet concentrations, one block of results each; without any, the job's own
            division of the data.
        equal: at which cost scores are read.
        emit: receives the events of every run.
        announce: told what comes next.

    Returns:
        the comparison, as written.

    Raises:
        ConfigError: contenders, baselines or levels that cannot be compared.
        RunFolderError: a run in `folder` was made with other settings, is damaged or in use.
        StorageError: the disk refused.
    """
    jobs = contender_jobs(job, contenders, baselines)
    for mine in jobs.values():
        check_engine(mine)
    check_skews(job, skews)
    levels: list[float | None] = [*skews] or [None]
    seeds = [job.run.seed + i for i in range(num_seeds)]
    places = [(skew, seed) for skew in levels for seed in seeds]
    for skew, seed in places:
        for label, mine in jobs.items():
            path = folder / "runs" / run_name(label, skew, seed)
            check_folder(placed(mine, skew, seed), path, f"contender {label!r}")
    runs: list[dict[str, Any]] = []
    for skew, seed in places:
        loader = _Loader()
        here = {label: placed(mine, skew, seed) for label, mine in jobs.items()}
        if not runs:
            for label, mine in here.items():
                with _named(label):
                    # what cannot run is refused before hours of what can
                    Federation(mine, loader.of(mine))
        for label, mine in here.items():
            _say(announce, label, skew, seed)
            with _named(label):
                path = folder / "runs" / run_name(label, skew, seed)
                found = strategy_run(mine, loader.of(mine), path, emit)
            runs.append({"label": label, "skew": skew, "seed": seed, **found})
        for name in baselines:
            _say(announce, f"baseline {name}", skew, seed)
            with _named(name):
                path = folder / "baselines" / run_name(name, skew, seed)
                mine = placed(job, skew, seed)
                found = baseline_run(mine, loader.of(mine), path, name, emit)
            runs.append({"label": name, "skew": skew, "seed": seed, **found})
    metric = _score(job, runs)
    comparison: dict[str, Any] = {
        "format": FORMAT,
        "name": job.run.name,
        "metric": metric,
        "equal": equal,
        "reference": contenders[0].label if contenders else None,
        "contenders": [
            *({"label": c.label, "kind": "strategy", "overrides": c.overrides} for c in contenders),
            *({"label": name, "kind": "baseline", "overrides": ()} for name in baselines),
        ],
        "levels": levels,
        # without a test file the clients' validation parts are the test, and they differ
        "own_test": job.data.test is None,
        "seeds": seeds,
        "rounds": job.federation.rounds,
        "steps_per_client": job.federation.rounds * job.training.local_steps,
        "machine": machine(job.run.threads),
        "runs": runs,
    }
    comparison["summary"] = summary_rows(parse_comparison(comparison))
    write_atomic(folder / "comparison.json", encode_json(comparison))
    return comparison


class _Loader:
    """Model and data, shared by the contenders that need the same; one at a time in memory."""

    def __init__(self) -> None:
        self._key: dict[str, Any] = {}
        self._loaded: Loaded | None = None

    def of(self, job: Job) -> Loaded:
        sections = {"model", "data", "partition", "adapter", "run"}
        key = job.model_dump(mode="json", include=sections)
        if self._loaded is None or key != self._key:
            self._loaded = None
            self._loaded, self._key = load(job), key
        return self._loaded


def _score(job: Job, runs: list[dict[str, Any]]) -> str:
    """The metric that is compared; every point of every curve gets its value."""
    seen = {key for run in runs for key in (*run.pop("base"), *run["final"])}
    metric = headline(job.model.task, dict.fromkeys(seen, 0.0)).key
    for run in runs:
        for point in run["curve"]:
            point["value"] = point["scores"].get(metric)
    return metric


def _say(announce: Announce | None, what: str, skew: float | None, seed: int) -> None:
    if announce:
        level = "" if skew is None else f", alpha {skew_text(skew)}"
        announce(f"{what}{level}, seed {seed}")


@contextmanager
def _named(label: str) -> Iterator[None]:
    """Errors of one contender say whose they are."""
    try:
        yield
    except (ConfigError, RunFolderError) as e:
        raise type(e)(f"contender {label!r}: {e}") from e
