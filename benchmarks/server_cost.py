"""What merging costs the server for an adapter of a 7B model.

64 matrices (32 of 4096 x 4096, 32 of 4096 x 11008), 16 clients whose ranks sum to at most
400, updates read from a spool file as in a run. Every strategy runs in a process of its own;
memory is the growth of its peak resident size over what it held before the merge, in units
of one adapter (float32, at the largest rank). The dense way (form the mean product, full SVD)
is measured on one matrix of each shape and multiplied.

    python benchmarks/server_cost.py --threads 2 --out benchmarks/results
"""

import argparse
import json
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from fedlora.adapter import AdapterSpec, AdapterState, LayerSpec, trained_shapes, with_rank
from fedlora.adapters import METHODS
from fedlora.messages import ClientUpdate, RoundPlan
from fedlora.seeds import generator
from fedlora.server.machine import machine
from fedlora.server.spool import Spool
from fedlora.strategies import STRATEGIES
from fedlora.strategies.base import ClientInfo, StrategyState
from fedlora.wire import encode_tensors

SHAPES = ((4096, 4096), (4096, 11008))
EQUAL = (24,) * 16  # 384
UNEQUAL = (4, 4, 4, 4, 8, 8, 8, 16, 16, 16, 32, 32, 32, 48, 64, 64)  # 360
WIDE = (64,) * 16  # 1024, beyond the bar: reported
FAST_BAR_S = 30.0
MEMORY_BAR = 3.5
MATRICES = 64
POOL = 0.02 * torch.randn(2**22, generator=torch.Generator().manual_seed(0))


def make_spec(layers: int, rank: int, method: str) -> AdapterSpec:
    """An adapter on `layers` layers of both shapes."""
    return AdapterSpec(
        method,
        rank,
        2.0 * rank,
        tuple(
            LayerSpec(f"l{i:02d}.m{j}", d, k, rank, 2.0)
            for i in range(layers)
            for j, (d, k) in enumerate(SHAPES)
        ),
        (),
        {},
        "base",
        0,
    )


def drawn(shapes: dict[str, tuple[int, ...]], *stream: object) -> dict[str, torch.Tensor]:
    """Factors of the size that training gives them, cut from one pool of random numbers.

    Each starts at a place of its own, for drawing them all would take longer than the merge.
    """
    found = {}
    for name, shape in shapes.items():
        size = torch.Size(shape).numel()
        draws = generator(0, *map(str, stream), name)
        start = int(torch.randint(len(POOL) - size, (1,), generator=draws))
        found[name] = POOL[start : start + size].reshape(shape).clone()
    return found


def one(strategy: str, options: dict, ranks: tuple[int, ...], layers: int, folder: Path) -> dict:
    """One round of one strategy: seconds and memory of reduce and refactor."""
    method = METHODS["lora-xs" if strategy == "fed-sb" else "lora"]
    rank = max(ranks)
    spec = make_spec(layers, rank, method.name)
    chosen = STRATEGIES[strategy](method, options)
    shapes = trained_shapes(spec, method)
    state: StrategyState = chosen.init(AdapterState(spec, drawn(shapes, "start")))
    spool = Spool(folder / "spool.bin")
    updates = []
    for index, own in enumerate(ranks):
        info = ClientInfo(f"{index:02d}", own)
        blank = RoundPlan("run", 1, 0, info.name, (), own, 1)
        sent = chosen.expect(state, chosen.plan(state, info, blank))
        spool.add(info.name, encode_tensors(drawn(sent, info.name)))
        updates.append(
            ClientUpdate(
                run="run",
                round=1,
                attempt=0,
                client=info.name,
                start_sha256="",
                delta=AdapterState(with_rank(spec, own), spool.tensors(info.name, sent)),
                num_examples=1.0 + index,
                start=chosen.broadcast(state, info).adapter,
                weight=1.0 + index,
            )
        )
    adapter_bytes = 4 * sum(torch.Size(shape).numel() for shape in shapes.values())
    before = _peak_bytes()
    started, worked = time.perf_counter(), time.process_time()
    new = chosen.refactor(state, chosen.reduce(state, updates))
    seconds, cpu = time.perf_counter() - started, time.process_time() - worked
    assert all(bool(t.isfinite().all()) for t in new.tensors.values())
    spool.close()
    return {
        "strategy": strategy,
        "options": options,
        "rank_sum": sum(ranks),
        "max_rank": rank,
        "matrices": len(spec.layers),
        "seconds": seconds,
        "cpu_s": cpu,
        "adapters": (_peak_bytes() - before) / adapter_bytes,
        "adapter_mib": adapter_bytes / 2**20,
        "linear": chosen.linear,
    }


def dense(shape: tuple[int, int], ranks: tuple[int, ...]) -> float:
    """Seconds to form the mean product of one matrix and take its full SVD."""
    d, k = shape
    pairs = [(torch.randn(d, r, generator=generator(0, "B", r)), torch.randn(r, k)) for r in ranks]
    started = time.perf_counter()
    mean = torch.zeros(d, k)
    for b, a in pairs:
        mean.addmm_(b, a, alpha=1.0 / len(pairs))
    torch.linalg.svd(mean, full_matrices=False)
    return time.perf_counter() - started


def _peak_bytes() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def cases() -> list[tuple[str, dict, tuple[int, ...]]]:
    """(strategy, options, ranks) of every line of the table."""
    found = []
    for name, kind in STRATEGIES.items():
        ranks = UNEQUAL if kind.hetero_rank else EQUAL
        found.append((name, {}, ranks))
    if "lora-fair" in STRATEGIES:
        found.append(("lora-fair", {"solver": "cosine"}, EQUAL))
    found += [(name, {}, WIDE) for name in ("flexlora", "lora-lego") if name in STRATEGIES]
    return found


def table(rows: list[dict], dense_s: float, where: dict, args: argparse.Namespace) -> str:
    """The results as Markdown, for 64 matrices."""
    measured = rows[0]["matrices"]
    factor = MATRICES / measured
    lines = [
        "# Cost of the server step for an adapter of a 7B model",
        "",
        f"{MATRICES} matrices of 4096 x 4096 and 4096 x 11008, 16 clients; "
        + (f"measured on {measured} and multiplied by {factor:g}; " if measured < MATRICES else "")
        + f"{where['processor']}, {args.threads} threads, torch {where['torch']}, "
        f"{platform.python_version()}. Command: `python benchmarks/server_cost.py "
        f"--threads {args.threads} --layers {args.layers}`.",
        "",
        "| strategy | options | sum of ranks | largest | seconds | CPU seconds | peak memory, "
        "adapters |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        options = ", ".join(f"{k} = {v}" for k, v in row["options"].items())
        lines.append(
            f"| {row['strategy']} | {options} | {row['rank_sum']} | {row['max_rank']} | "
            f"{factor * row['seconds']:.1f} | {factor * row['cpu_s']:.1f} | {row['adapters']:.2f} |"
        )
    lines += [
        f"| the dense way (mean product, full SVD) | | 400 | | {dense_s:.0f} | | |",
        "",
        "The dense way was measured on one matrix of each shape and multiplied by their number. "
        f"Bars: {FAST_BAR_S:.0f} s at sums of at most 400 with the default solver; "
        f"{MEMORY_BAR} adapters for linear strategies. Sums above 400 and the cosine solver "
        "stand outside the bars.",
    ]
    missed = [
        f"{row['strategy']} (sum {row['rank_sum']})"
        for row in rows
        if row["rank_sum"] <= 400
        and not row["options"]
        and (
            factor * row["seconds"] > FAST_BAR_S or (row["linear"] and row["adapters"] > MEMORY_BAR)
        )
    ]
    lines += ["", f"Bars missed: {', '.join(missed) or 'none'}.", ""]
    return "\n".join(lines)


def main() -> None:
    """Runs every case in a process of its own and writes server_cost.md and .json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--only", default="")
    parser.add_argument("--case", default="")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.case:
        name, options, ranks = json.loads(args.case)
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(one(name, options, tuple(ranks), args.layers, Path(folder))))
        return
    rows = []
    for case in cases():
        if args.only and case[0] not in args.only.split(","):
            continue
        command = [sys.executable, __file__, "--case", json.dumps(case)]
        command += ["--threads", str(args.threads), "--layers", str(args.layers)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(rows[-1], flush=True)
    dense_s = MATRICES / 2 * sum(dense(shape, EQUAL) for shape in SHAPES)
    where = machine(args.threads)
    (args.out / "server_cost.md").write_text(table(rows, dense_s, where, args))
    result = {"machine": where, "rows": rows, "dense_s": dense_s}
    (args.out / "server_cost.json").write_text(json.dumps(result, indent=1))
    print(table(rows, dense_s, where, args))


if __name__ == "__main__":
    main()
