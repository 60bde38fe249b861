"""The Ray engine from the command line: refused without Ray, and ended by Ctrl-C."""

import json
import os
import signal
import subprocess
import sys

import pytest

pytest.importorskip("ray", reason="the Ray engine needs the extra `ray`")

from fedlora.config.job import Job
from fedlora.config.load import dump_job
from fedlora.errors import ConfigError
from fedlora.models.loaded import load
from fedlora.simulation.ray_cluster import Cluster
from tests.cli.command import fedlora
from tests.simulation.runs import Run


@pytest.mark.parametrize("verb", ["simulate", "compare"])
def test_without_ray_the_engine_is_refused_before_anything_is_loaded(
    monkeypatch, capsys, tmp_path, verb
):
    (tmp_path / "job.toml").write_text('model.name = "not there"\nrun.engine = "ray"\n')
    monkeypatch.setitem(sys.modules, "ray", None)
    words = [verb, tmp_path / "job.toml", "--out", tmp_path / "x"]
    done = fedlora(monkeypatch, capsys, *words)
    assert done.code == 2
    assert "pip install 'fedlora[ray]'" in done.err
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("text", ["0", "two", "-1"])
def test_a_number_of_workers_that_is_none_is_refused(monkeypatch, text):
    monkeypatch.setenv("FEDLORA_RAY_WORKERS", text)
    with pytest.raises(ConfigError, match="no number of workers"):
        Cluster(Job(), 2)


@pytest.mark.slow
def test_ctrl_c_ends_the_workers_and_keeps_the_committed_rounds(make_job, tmp_path):
    """Sent to the whole process group, as a terminal does."""
    job = make_job(federation={"rounds": 1_000_000}, run={"engine": "ray"})
    (tmp_path / "job.toml").write_text(dump_job(job))
    run = tmp_path / "run"
    words = ["simulate", str(tmp_path / "job.toml"), "--out", str(run)]
    child = subprocess.Popen(
        [sys.executable, "-m", "fedlora.cli", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert child.stdout is not None
    assert child.stderr is not None
    while not child.stdout.readline().startswith("round 2/"):
        assert child.poll() is None, child.stderr.read()
    os.killpg(child.pid, signal.SIGINT)
    # ends only when every worker has let go of the pipes it inherited
    _, err = child.communicate(timeout=120)
    assert child.returncode == 130
    assert f"fedlora resume {run}" in err
    assert "Traceback" not in err
    head = int((run / "HEAD").read_text().split()[0])
    assert head >= 2
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == head + 1
    local = Run(make_job(federation={"rounds": 1_000_000}), tmp_path / "local", load(make_job()))
    local.go(until=head)
    assert local.adapters() == [line["adapter_sha256"] for line in lines[1:]]
