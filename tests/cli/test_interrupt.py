"""Ctrl-C while a verb is loading, and in the middle of a round."""

import os
import shutil
import signal
import subprocess
import sys
import threading

import pytest

from fedlora.server.interrupt import shielded
from tests.cli.command import fedlora


@pytest.fixture(autouse=True)
def ctrl_c():
    """Works also where the tests were started in the background, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    ("verb", "pipe", "words"),
    [
        ("simulate", "job.toml", ["--out", "{out}"]),
        ("compare", "job.toml", ["--out", "{out}"]),
        ("resume", "rounds/0002/round.json", []),
        ("evaluate", "adapter/adapter_model.safetensors", []),
        ("export", "adapter/adapter_model.safetensors", ["--out", "{out}"]),
        ("inspect", "rounds/0002/round.json", []),
    ],
)
def test_ctrl_c_while_a_verb_reads_its_input(
    finished, tmp_path, monkeypatch, capsys, verb, pipe, words
):
    """The input is a pipe that nobody writes to, so the verb is still reading when it comes."""
    run = shutil.copytree(finished, tmp_path / "run")
    (run / pipe).unlink()
    os.mkfifo(run / pipe)

    def press() -> None:
        writer = os.open(run / pipe, os.O_WRONLY)
        os.kill(os.getpid(), signal.SIGINT)
        # a reader that had not begun to wait when the signal came must not wait for ever
        os.close(writer)

    threading.Thread(target=press, daemon=True).start()
    path = run / pipe if pipe == "job.toml" else run
    more = [word.format(out=tmp_path / "out") for word in words]
    done = fedlora(monkeypatch, capsys, verb, path, *more)
    assert done.code == 130
    assert done.err == "interrupted\n"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "code", "out", "err"),
    [
        (["--help"], 0, "Commands:", ""),
        (["export", "--help"], 0, "export [OPTIONS] PATH", ""),
        ([], 2, "", "Commands:"),
        (["--bogus"], 2, "", "Error: No such option '--bogus'"),
        (["simulat"], 2, "", "Did you mean 'simulate'?"),
        (["export", "run"], 2, "", "Error: Missing option '--out'"),
        (["resume"], 2, "", "Error: Missing argument 'FOLDER'"),
        (["compare", "x", "--out", "y", "--seeds", "0"], 2, "", "Error: Invalid value"),
    ],
)
def test_usage_is_said_by_the_command_line_itself(monkeypatch, capsys, words, code, out, err):
    done = fedlora(monkeypatch, capsys, *words)
    assert done.code == code
    assert out in done.out
    assert err in done.err
    assert bool(done.out) == bool(out)
    assert bool(done.err) == bool(err)


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
    # nothing of libraries that find their objects left behind
    assert "leaked" not in err
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
