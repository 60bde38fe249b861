"""The GPU benchmark: every table runs to its end, and a bar is judged by what was measured."""

import importlib
import inspect
import json
import pkgutil

import pytest

from benchmarks import gpu
from benchmarks.kernels import launches
from benchmarks.kernels.bars import BARS, Bar, judged
from fedlora.ops import kernels

# what only a GPU can say, and sizes that differ from M1 by nothing but their size
NEEDS_GPU = {"M2", "M3", "K4 1B", "K4 8B", "K7 peak", "K7 saved", "K8", "L1 memory", "L1 Liger"}
NEEDS_GPU |= {"codec encode", "codec encode at random", "codec sum"}


@pytest.fixture(scope="module")
def figures():
    pytest.importorskip("peft")
    found = {}
    for table in [table for table in gpu.TABLES if table != "up_projection"]:
        module = importlib.import_module(f"benchmarks.kernels.{table}")
        arguments = {"tokens": 16} if table == "linears" else {}
        one = {} if table == "step" else {"repeats": 1}
        found[table] = module.figures("cpu", tiny=True, **arguments, **one)
    return found


def test_every_bar_but_those_of_a_gpu_has_a_figure_of_one_table(figures):
    names = [name for table in figures.values() for name in table]
    assert len(names) == len(set(names))
    assert set(names) == {bar.name for bar in BARS} - NEEDS_GPU


def test_what_does_not_depend_on_a_device_holds_here(figures):
    lines = {line["bar"]: line for line in judged(figures["private"] | figures["codec"])}
    assert lines["codec bytes"]["passed"] is True
    assert lines["D3"]["passed"] is True
    assert figures["clients"]["M6"][0] < 1e-5


def test_a_bar_is_judged_by_the_median_on_its_side():
    least, most = Bar("a", "", 2.0, None), Bar("b", "", 2.0, None, most=True)
    assert least.passed([1.0, 2.0, 9.0]) is True
    assert least.passed([1.0, 1.9, 9.0]) is False
    assert most.passed([1.0, 2.0, 9.0]) is True
    assert most.passed([2.1]) is False
    assert least.passed([]) is None


def test_a_table_that_fails_or_hangs_costs_only_itself():
    figures, said = gpu.run("no_such_table", "cpu", tiny=True, limit_s=60)
    assert not figures
    assert said.startswith("failed: ")
    assert "no_such_table" in said
    assert gpu.run("loss", "cpu", tiny=True, limit_s=0.01) == ({}, "stopped after 0 s")
    assert gpu.run("loss", "cpu", tiny=True, limit_s=0.0) == ({}, "not run: no time left")


def test_all_of_it_fits_into_25_minutes():
    assert sum(gpu.TABLES.values()) + sum(gpu.SANITIZER.values()) <= 25 * 60


def test_every_kernel_is_launched_for_the_sanitizer(monkeypatch):
    monkeypatch.setenv("FEDLORA_OPS", "interpret")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    run = set()

    def noted(name, kernel):
        def launch(*arguments, **settings):
            run.add(name)
            return kernel(*arguments, **settings)

        return launch

    names = [info.name for info in pkgutil.iter_modules(kernels.__path__)]
    imported = {name: importlib.import_module(f"{kernels.__name__}.{name}") for name in names}
    # sums of parts are another kernel's end
    modules = {n for n, module in imported.items() if hasattr(module, "AOT")} - {"row_blocks"}
    for name in modules:
        module = imported[name]
        own = {n for n, f in vars(module).items() if inspect.isfunction(f)}
        for entry in [n for n in own if n.rstrip("_") in (name, "encode")]:
            monkeypatch.setattr(module, entry, noted(name, getattr(module, entry)))
    launches.main()
    assert run == modules == set(launches.NAMES)


@pytest.mark.parametrize(
    ("exit_code", "said"),
    [(0, "passed"), (9, "failed: ========= Invalid __global__ write"), (None, "stopped after 1 s")],
)
def test_what_the_sanitizer_says(exit_code, said, monkeypatch, tmp_path):
    program = tmp_path / "compute-sanitizer"
    line = "exec sleep 60" if exit_code is None else f"exit {exit_code}"
    text = "echo '========= COMPUTE-SANITIZER' | tail -0; echo '========= Invalid __global__ write'"
    program.write_text(f"#!/bin/sh\n{text}\n{line}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert gpu.sanitized("memcheck", 1 if exit_code is None else 30) == said


def test_a_sanitizer_that_is_not_there_is_said(monkeypatch):
    monkeypatch.setattr(gpu.shutil, "which", lambda name: "/nowhere/at/all")
    assert gpu.sanitized("memcheck", 30) == "not run: compute-sanitizer is not installed"


def test_without_a_gpu_the_page_has_predictions_and_says_that_nothing_was_measured(
    tmp_path, monkeypatch
):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["gpu.py", "--out", str(tmp_path)])
    gpu.main()
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["device"] is None
    assert {line["passed"] for line in found["bars"]} == {None}
    page = (tmp_path / "gpu.md").read_text()
    assert "**Nothing was measured**" in page
    assert "| K1 1B | PEFT's default / ours, times | >= 1.6 | 2 | - | not measured |" in page


def test_a_page_with_figures_says_what_failed():
    page = gpu.page(
        {
            "device": "a GPU",
            "tb_per_s": 4.2,
            "tflop_per_s": 780.0,
            "tables": {"linears": "100 s"},
            "bars": judged({"K1 1B": [1.7, 1.8, 1.9], "K6 1B": [1.4]}),
        }
    )
    assert "| 1.8 (1.7 to 1.9) | passed |" in page
    assert "| 1.4 (1.4 to 1.4) | **failed** |" in page
    assert "4.20 TB/s" in page
