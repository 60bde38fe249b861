"""Many clients in one pass beside one after the other, and grouped products beside torch's.

    python -m benchmarks.kernels.clients [--device cuda]

Prints one JSON object of figures by bar. The models have random weights in the shapes of 1B and
of eight layers of 8B, and a small vocabulary; see benchmarks/cohort.py. What M5 compares with is
a stand-in for a process for each client: a client's own training and a load of the model, both
measured here, times the clients.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from benchmarks.cohort import measure, run_case
from benchmarks.cohort_job import Case
from benchmarks.kernels.timing import Run, milliseconds, ratios
from fedlora.ops.multi_lora import multi_lora

Sizes = list[int]
# of every table: bar -> layers, hidden width, tokens
MODELS = {
    "M1": (16, 2048, 256),
    "M2": (16, 2048, 512),
    "M3": (8, 4096, 256),
    "": (16, 2048, 2048),
}


def figures(device: str, *, tiny: bool = False, repeats: int = 3) -> dict[str, list[float]]:
    """Figures of M1 to M7 by bar."""
    found: dict[str, list[float]] = {}
    everything = []
    for bar, (layers, hidden, tokens) in MODELS.items():
        taken: dict[str, list[float]] = {}
        load_s = 0.0
        for engine in ("alone", "cohort"):
            size = (1, 64, 8) if tiny else (layers, hidden, tokens)
            case = Case(
                engine,
                clients=2 if tiny else 16,
                layers=size[0],
                hidden=size[1],
                batch=1,
                tokens=size[2],
                steps=1 if tiny else 10,
                rounds=repeats + 1,
                device=device,
                dtype="float32" if tiny else "bfloat16",
            )
            measured = _here(case) if tiny else run_case(case)
            taken[engine] = measured["round_s"]
            load_s = measured["load_s"]
        times = ratios(taken["alone"], taken["cohort"])
        everything += times
        if bar:
            found[bar] = times
        if bar == "M1":
            loaded = [seconds + case.clients * load_s for seconds in taken["alone"]]
            found["M5"] = ratios(loaded, taken["cohort"])
        if tiny:
            break
    found["M4"] = [min(everything)]
    found["M6"] = [_difference(device)]
    return found | _grouped(device, tiny=tiny, repeats=repeats)


def _here(case: Case) -> dict[str, Any]:
    """Of small shapes, whose time means nothing, in this process."""
    with tempfile.TemporaryDirectory() as folder:
        return measure(case, Path(folder))


def _difference(device: str) -> float:
    """Largest relative difference of a factor after ten steps together and one by one."""
    ends = []
    for engine in ("alone", "cohort"):
        case = Case(engine, clients=4, layers=2, hidden=64, rounds=1, device=device)
        with tempfile.TemporaryDirectory() as folder:
            measure(case, Path(folder))
            ends.append(load_file(Path(folder) / "run" / "rounds" / "0001" / "global.safetensors"))
    alone, cohort = ends
    return max(float((cohort[n] - v).norm() / v.norm()) for n, v in alone.items() if v.any())


def _grouped(device: str, *, tiny: bool, repeats: int) -> dict[str, list[float]]:
    """One linear of 1B for groups of rows, by our kernels and by the products of torch."""
    unit, width = (2, 32) if tiny else (64, 2048)
    cases: dict[str, tuple[Sizes, tuple[str, ...]]] = {
        "M7 equal": ([8 * unit] * 16, ("bmm", "grouped")),
        "M7 ragged": ([unit * (1 + i) for i in range(16)], ("padded", "grouped", "loop")),
        "M7 masked": ([unit] * 64, ("masked",)),
    }
    if device == "cpu":
        # no kernels to compare with, and no grouped products: the ways themselves are run
        cases = {bar: (sizes, ("loop",)) for bar, (sizes, _) in cases.items()}
    found = {}
    for bar, (sizes, ways) in cases.items():
        own = "triton" if device == "cuda" else "padded"
        steps = {way: _step(device, sizes, width, way) for way in (own, *ways)}
        values = []
        for _ in range(repeats):
            taken = {way: milliseconds(step, device) for way, step in steps.items()}
            values.append(min(taken[way] for way in ways) / taken[own])
        found[bar] = values
    return found


def _step(device: str, sizes: Sizes, width: int, way: str) -> Run:
    draws = torch.Generator(device).manual_seed(0)

    def normal(*size: int) -> torch.Tensor:
        made = torch.randn(*size, generator=draws, device=device)
        return made.bfloat16() if device == "cuda" else made

    x = normal(sum(sizes), width).requires_grad_()
    weight = normal(width, width)
    a = normal(len(sizes), 16, width).requires_grad_()
    b = normal(len(sizes), width, 16).requires_grad_()
    slope = normal(sum(sizes), width)

    def step() -> None:
        y = multi_lora(x, weight, None, a, b, 1.0, sizes, way=way)
        torch.autograd.grad(y, (x, a, b), slope)

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="shapes that a CPU does in seconds")
    given = parser.parse_args()
    print(json.dumps(figures(given.device, tiny=given.tiny)))


if __name__ == "__main__":
    main()
