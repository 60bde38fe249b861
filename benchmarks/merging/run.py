"""Trains adapters, merges them in every way, and writes what came out.

    PYTHONPATH=. python -m benchmarks.merging.run --work runs/vision --adapters runs/merging

Options of a method are chosen on seed 100, which is not scored; seeds 0 to 4 are. Adapters and
seeds that are already there are not made again.
"""

import argparse
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.merging.contenders import (
    CONTENDERS,
    Contender,
    Grams,
    Variant,
    agreement,
    collect_grams,
    distance_from_mean,
)
from benchmarks.merging.tabulate import write
from benchmarks.merging.train import CASES, RATE, STEPS, Bench, Case
from benchmarks.vision.prepare import DOMAINS, prepare
from benchmarks.vision.run import commit
from benchmarks.vision.settings import FIRST_TUNING_SEED
from fedlora.linalg import Pair
from fedlora.merging.sources import Source
from fedlora.server.machine import machine
from fedlora.storage import write_atomic

Line = dict[str, Any]


def measure(
    bench: Bench,
    sources: Sequence[Source],
    grams: Sequence[Grams],
    contender: Contender,
    variants: Sequence[Variant],
    domains: Iterable[str] = DOMAINS,
) -> list[Line]:
    """Merges as each variant says, and how good the result is.

    Returns:
        Per variant accuracy (mean over domains) and its "domains"; rank, the largest of a
        layer; bytes of the result in float32; distance from the mean change, as a part of it;
        seconds of the merge, without loading and without RegMean's statistics.
    """
    lines = []
    options: Mapping[str, Any] | None = None
    merged: Mapping[str, Pair] = {}
    seconds = 0.0
    for variant in variants:
        # variants that differ in the factor alone come one after the other
        if variant.options != options:
            started = time.perf_counter()
            merged = contender.merge(sources, variant.options, grams, bench.seed)
            seconds = time.perf_counter() - started
            options = variant.options
        changes = {name: (variant.factor * b, a) for name, (b, a) in merged.items()}
        bench.hold_change(changes)
        scores = bench.accuracies(domains)
        lines.append(
            {
                "contender": contender.label,
                "variant": str(variant),
                "accuracy": fmean(scores.values()),
                "domains": scores,
                "rank": max(right.shape[0] for _, right in changes.values()),
                "bytes": sum(4 * factor.numel() for pair in changes.values() for factor in pair),
                "distance": distance_from_mean(changes, sources),
                "seconds": seconds,
            }
        )
    return lines


def references(bench: Bench, case: Case, sources: Sequence[Source]) -> Line:
    """Accuracies of the base and of each adapter alone, on every domain; the adapters' cosine."""
    with bench.loaded.adapted.base_only():
        base = bench.accuracies(case.ranks)
    singles = {}
    for domain, source in zip(case.ranks, sources, strict=True):
        bench.hold(source.spec, source.tensors)
        singles[domain] = bench.accuracies(case.ranks)
    return {"base": base, "singles": singles, "cosine": agreement(sources)}


def statistics(bench: Bench, case: Case, sources: Sequence[Source]) -> Sequence[Grams]:
    """RegMean's Grams of every adapter on its own training pictures."""
    grams = []
    for domain, source in zip(case.ranks, sources, strict=True):
        bench.hold(source.spec, source.tensors)
        grams.append(collect_grams(bench.loaded.adapted, bench.loaded.data.clients[domain].train))
    return grams


def best(lines: Sequence[Line], contender: str) -> str:
    """The variant of a contender with the highest accuracy; the first one of several."""
    own = [line for line in lines if line["contender"] == contender]
    found: str = max(own, key=lambda line: line["accuracy"])["variant"]
    return found


def run_seed(found: Line, work: Path, adapters: Path, seed: int) -> None:
    """Adds to `found` what one seed gives, in every case: all variants, or the chosen ones."""
    tuning = seed >= FIRST_TUNING_SEED
    missing = [name for name in CASES if str(seed) not in found["seeds"].get(name, {})]
    if not missing:
        return
    bench = Bench(prepare(work, seed), seed)
    for name in missing:
        case = CASES[name]
        sources = bench.adapters(adapters, case)
        grams = statistics(bench, case, sources)
        lines = []
        for contender in CONTENDERS:
            variants = list(contender.variants())
            if not tuning:
                tried = found["seeds"][name][str(FIRST_TUNING_SEED)]["lines"]
                tuned = best(tried, contender.label)
                variants = [variant for variant in variants if str(variant) == tuned]
            lines += measure(bench, sources, grams, contender, variants, case.ranks)
        found["seeds"].setdefault(name, {})[str(seed)] = {
            **references(bench, case, sources),
            "lines": lines,
            "commit": commit(),
        }
        mean = next(line for line in lines if line["contender"] == CONTENDERS[0].label)
        print(f"seed {seed} {name}: mean {mean['accuracy']:.4f}", flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs what the results file lacks, and writes page and picture beside it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--work", type=Path, default=Path("runs/vision"), help="data and models")
    add("--adapters", type=Path, default=Path("runs/merging"), help="trained adapters")
    add("--out", type=Path, default=Path(__file__).parents[1] / "results", help="folder")
    add("--seeds", type=int, nargs="+", default=list(range(5)))
    options = parser.parse_args(arguments)
    path = options.out / "merging.json"
    found: Line = {
        "machine": machine(threads=1),
        "steps": STEPS,
        "rate": RATE,
        "seeds": {},
    }
    if path.is_file():
        found = json.loads(path.read_text("utf-8"))
    for seed in (FIRST_TUNING_SEED, *options.seeds):
        run_seed(found, options.work, options.adapters, seed)
        options.out.mkdir(parents=True, exist_ok=True)
        write_atomic(path, (json.dumps(_rounded(found)) + "\n").encode())
    print(write(path))


def _rounded(value: Any) -> Any:
    """Figures with the digits that mean something."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: _rounded(inner) for key, inner in value.items()}
    return [_rounded(inner) for inner in value] if isinstance(value, list) else value


if __name__ == "__main__":
    main()
