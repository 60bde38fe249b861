"""Everything that needs a GPU, in at most 25 minutes: every bar, what was predicted, what came out.

    PYTHONPATH=. python benchmarks/gpu.py [--minutes 25]

Each table is a process of its own with a limit, the most telling ones first, so that one that
fails or hangs costs nothing but itself. Writes gpu.json and gpu.md into --out; without a GPU
these have the predictions, and say that nothing was measured.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.kernels.bars import judged
from benchmarks.kernels.timing import milliseconds

# seconds that each may take, in order of worth
TABLES = {
    **{"linears": 410, "loss": 150, "clients": 400, "private": 210, "step": 90},
    **{"up_projection": 60, "codec": 30},
}
# tools of compute-sanitizer, seconds for each
SANITIZER = {"memcheck": 75, "racecheck": 75}


def main() -> None:
    """Runs the tables and writes both files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=25.0)
    parser.add_argument("--tiny", action="store_true", help="small shapes, also on a CPU")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    given = parser.parse_args()
    found: dict[str, Any] = {"device": None, "tables": {}}
    figures: dict[str, list[float]] = {}
    gpu = torch.cuda.is_available()
    if gpu or given.tiny:
        found |= _device() if gpu else {"device": "cpu, tiny shapes: not what the bars are about"}
        ends = time.monotonic() + 60.0 * given.minutes
        for table, limit in TABLES.items():
            left = min(limit, ends - time.monotonic())
            made, said = run(table, "cuda" if gpu else "cpu", tiny=given.tiny, limit_s=left)
            found["tables"][table] = said
            figures |= made
            print(f"{table}: {said}", flush=True)
        if gpu:
            found["sanitizer"] = {
                tool: sanitized(tool, min(limit, ends - time.monotonic()))
                for tool, limit in SANITIZER.items()
            }
    found["bars"] = judged(figures)
    # a race has no demand
    judged_names = {line["bar"] for line in found["bars"]}
    found["others"] = {name: made for name, made in figures.items() if name not in judged_names}
    (given.out / "gpu.json").write_text(json.dumps(found, indent=1) + "\n")
    (given.out / "gpu.md").write_text(page(found))


def run(
    table: str, device: str, *, tiny: bool, limit_s: float
) -> tuple[dict[str, list[float]], str]:
    """A table's figures, and how it went."""
    if limit_s <= 0:
        return {}, "not run: no time left"
    command = [sys.executable, "-m", f"benchmarks.kernels.{table}", "--device", device]
    started = time.monotonic()
    try:
        done = subprocess.run(
            command + ["--tiny"] * tiny,
            capture_output=True,
            text=True,
            timeout=limit_s,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {}, f"stopped after {limit_s:.0f} s"
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [""])[-1]
        return {}, f"failed: {last}"
    figures: dict[str, list[float]] = json.loads(done.stdout.strip().splitlines()[-1])
    return figures, f"{time.monotonic() - started:.0f} s"


def sanitized(tool: str, limit_s: float) -> str:
    """What a tool of compute-sanitizer says of one launch of every kernel."""
    program = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(program).is_file():
        return "not run: compute-sanitizer is not installed"
    if limit_s <= 0:
        return "not run: no time left"
    command = [program, "--tool", tool, "--error-exitcode", "9", sys.executable, "-m"]
    try:
        done = subprocess.run(
            [*command, "benchmarks.kernels.launches"],
            env={**os.environ, "FEDLORA_OPS": "triton"},
            capture_output=True,
            text=True,
            timeout=limit_s,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"stopped after {limit_s:.0f} s"
    if not done.returncode:
        return "passed"
    lines = (done.stdout + done.stderr).strip().splitlines()
    errors = [line for line in lines if line.startswith("=========") and line.strip("= ")]
    return f"failed: {(errors or lines or ['nothing was said'])[0]}"


def _device() -> dict[str, Any]:
    """Its name, and what it reaches: a copy of 4 GiB, and a product of 8,192^3 in bfloat16."""
    source = torch.randn(2**30, device="cuda")
    target = torch.empty_like(source)
    copied = milliseconds(partial(target.copy_, source), "cuda")
    bandwidth = 2 * source.numel() * source.element_size() / copied * 1e-9
    a, b = (torch.randn(8192, 8192, device="cuda").bfloat16() for _ in range(2))
    product = 2 * 8192**3 / milliseconds(lambda: a @ b, "cuda") * 1e-9
    versions = {"torch": torch.__version__}
    return {
        "device": torch.cuda.get_device_name(),
        "tb_per_s": bandwidth,
        "tflop_per_s": product,
        **versions,
    }


def page(found: Mapping[str, Any]) -> str:
    """The bars as markdown."""
    out = ["# The fast paths on a GPU", "", "`PYTHONPATH=. python benchmarks/gpu.py`", ""]
    if found["device"] is None:
        out += [
            "**Nothing was measured**: no GPU was at hand. These are demands and predictions.",
            "",
        ]
    else:
        out += [f"Device: {found['device']}."]
        if "tb_per_s" in found:
            out += [
                f"It copies {found['tb_per_s']:.2f} TB/s and multiplies "
                f"{found['tflop_per_s']:.0f} TFLOP/s in bfloat16."
            ]
        out += ["", *(f"- {table}: {said}" for table, said in found["tables"].items()), ""]
        tools = found.get("sanitizer", {})
        out += [
            f"- compute-sanitizer, {tool}, every kernel: {said}" for tool, said in tools.items()
        ]
        out += [""] if tools else []
    out += [
        "| bar | what | demand | predicted | measured (range) | |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    words = {True: "passed", False: "**failed**", None: "not measured"}
    for line in found["bars"]:
        values = line["measured"]
        shown = f"{median(values):.3g} ({min(values):.3g} to {max(values):.3g})" if values else "-"
        ends = line["predicted"]
        predicted = "-" if ends is None else "-".join(f"{end:g}" for end in sorted({*ends}))
        out.append(
            f"| {line['bar']} | {line['what']} | {line['demand']} | {predicted} | {shown} | "
            f"{words[line['passed']]} |"
        )
    if found.get("others"):
        out += ["", "Without a demand:", "", "| what | measured (range) |", "| --- | --- |"]
        for name, values in found["others"].items():
            shown = f"{median(values):.3g} ({min(values):.3g} to {max(values):.3g})"
            out.append(f"| {name} | {shown} |")
    return "\n".join([*out, ""])


if __name__ == "__main__":
    main()
