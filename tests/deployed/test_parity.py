"""A deployed run gives the same adapter as a simulation, bit for bit."""

from pathlib import Path

import pytest

from tests.deployed.federation import Deployed, call, digests, write_job


@pytest.fixture
def job(make_job, tmp_path):
    return write_job(
        tmp_path / "job.toml",
        make_job(partition={"clients": 2}, federation={"rounds": 2, "deadline_s": 120.0}),
    )


def test_processes_with_tls_give_the_adapter_of_a_simulation(job, tmp_path):
    call("simulate", job, "--out", tmp_path / "simulated")
    clients = {f"client-{k:03d}": ["--partition", k] for k in range(2)}
    with Deployed(tmp_path, clients) as deployed:
        done = deployed.run(job, tmp_path / "deployed", check=False)
        assert done.returncode == 0, done.stderr + deployed.logs()
    assert digests(tmp_path / "deployed") == digests(tmp_path / "simulated")
    first, second = (tmp_path / n / "adapter" for n in ("simulated", "deployed"))
    name = "adapter_model.safetensors"
    assert (first / name).read_bytes() == (second / name).read_bytes()
    assert Path(tmp_path / "deployed" / "report.html").is_file()
