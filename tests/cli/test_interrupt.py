"""Ctrl-C in the middle of a round."""

import os
import signal
import subprocess
import sys

import pytest

from fedlora.server.interrupt import shielded


def test_ctrl_c_keeps_the_committed_rounds_and_says_how_to_go_on(job, tmp_path):
    run = tmp_path / "run"
    words = ["simulate", str(job), "--out", str(run), "-o", "federation.rounds=1000000"]
    child = subprocess.Popen(
        [sys.executable, "-m", "fedlora.cli", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    while not child.stdout.readline().startswith("round 2/"):
        assert child.poll() is None
    os.kill(child.pid, signal.SIGINT)
    _, err = child.communicate(timeout=120)
    assert child.returncode == 130
    assert f"fedlora resume {run}" in err
    assert "Traceback" not in err
    head = int((run / "HEAD").read_text().split()[0])
    assert head >= 2
    rounds = [line for line in (run / "metrics.jsonl").read_text().splitlines() if line]
    assert len(rounds) == head + 1


def test_ctrl_c_inside_a_shield_waits_for_its_end():
    finished = []

    def commit():
        with shielded():
            os.kill(os.getpid(), signal.SIGINT)
            with shielded():
                os.kill(os.getpid(), signal.SIGINT)
            finished.append(True)

    with pytest.raises(KeyboardInterrupt):
        commit()
    assert finished


def test_a_shield_without_ctrl_c_changes_nothing():
    before = signal.getsignal(signal.SIGINT)
    with shielded():
        pass
    assert signal.getsignal(signal.SIGINT) is before
    with pytest.raises(ValueError, match="inside"), shielded():
        raise ValueError("inside")
    assert signal.getsignal(signal.SIGINT) is before
