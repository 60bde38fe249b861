"""kill -9 at random points: nothing committed is lost, and the result is the same bits."""

import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fedlora.checkpoint import RunStore
from tests.faults.crash import NaiveStore, create, drive, run_trial

torch.set_num_threads(1)


def undisturbed(folder: Path) -> str:
    create(folder, RunStore)
    return drive(folder, RunStore, folder.with_name("acknowledged"))


@pytest.mark.parametrize("trials", [3, pytest.param(50, marks=pytest.mark.slow)])
def test_a_killed_run_resumes_without_loss_to_the_same_bits(tmp_path, trials):
    """Oracle: the uninterrupted run, and a log of acknowledged rounds outside the folder."""
    expected = undisturbed(tmp_path / "whole")
    kills = 0
    for seed in range(trials):
        trial = run_trial(tmp_path / f"run{seed}", RunStore, seed)
        kills += trial.kills
        assert not trial.problem
        assert trial.sha256 == expected
        shutil.rmtree(tmp_path / f"run{seed}")
    assert kills >= 5 * trials


@pytest.mark.parametrize("trials", [4, pytest.param(25, marks=pytest.mark.slow)])
def test_the_campaign_breaks_a_naive_save(tmp_path, trials):
    """If the same kills did not break the usual way of saving, they would prove nothing."""
    expected = undisturbed(tmp_path / "whole")
    broken = 0
    for seed in range(trials):
        # a naive round has fewer operations, so the kills are as dense in rounds as above
        trial = run_trial(tmp_path / f"run{seed}", NaiveStore, seed, longest=12)
        broken += bool(trial.problem) or trial.sha256 != expected
        shutil.rmtree(tmp_path / f"run{seed}")
    assert broken >= trials / 2


JOB = """
[model]
name = "builtin:tiny-llama"
[data]
max_length = 32
max_rows = 40
max_validation = 4
[partition]
clients = 3
[adapter]
rank = 2
targets = ["q_proj"]
[training]
local_steps = 1
batch_size = 2
[federation]
rounds = 12
[evaluation]
every = 12
"""


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "fedlora.cli", *words]


@pytest.mark.slow
@pytest.mark.parametrize("trials", [1, 25])
def test_the_command_line_resumes_a_killed_simulation(tmp_path, trials):
    """The whole program: fedlora simulate, kill -9, fedlora resume, until it is done."""
    job = tmp_path / "job.toml"
    job.write_text(JOB)
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    subprocess.run(
        command("simulate", str(job), "--out", str(tmp_path / "whole")), check=True, **quiet
    )
    expected = (tmp_path / "whole" / "adapter" / "adapter_model.safetensors").read_bytes()
    for seed in range(trials):
        chance = random.Random(seed)
        run = tmp_path / f"run{seed}"
        child = subprocess.Popen(
            command("simulate", str(job), "--out", str(run)), stdout=subprocess.PIPE, text=True
        )
        _kill_after_lines(child, chance.randint(3, 9))
        again = subprocess.Popen(command("resume", str(run)), stdout=subprocess.PIPE, text=True)
        _kill_after_lines(again, chance.randint(1, 3))
        subprocess.run(command("resume", str(run)), check=True, **quiet)
        found = (run / "adapter" / "adapter_model.safetensors").read_bytes()
        assert found == expected


def _kill_after_lines(child: "subprocess.Popen[str]", lines: int) -> None:
    """Kills the process when it has printed so many lines (or has ended)."""
    assert child.stdout is not None
    for _ in range(lines):
        if not child.stdout.readline():
            break
    if child.poll() is None:
        os.kill(child.pid, signal.SIGKILL)
    child.wait()
    child.stdout.close()
