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


@pytest.mark.slow
def test_private_clients_keep_ledgers_and_give_the_adapter_of_a_simulation(make_job, tmp_path):
    """With noise from a seed, for otherwise no two runs are alike."""
    job = write_job(
        tmp_path / "job.toml",
        make_job(
            partition={"clients": 2},
            federation={"rounds": 2, "deadline_s": 120.0},
            privacy={"epsilon": 8.0, "delta": 1e-3, "noise": "test"},
        ),
    )
    call("simulate", job, "--out", tmp_path / "simulated")
    clients = {f"client-{k:03d}": ["--partition", k] for k in range(2)}
    with Deployed(tmp_path, clients) as deployed:
        done = deployed.run(job, tmp_path / "deployed", check=False)
        assert done.returncode == 0, done.stderr + deployed.logs()
    assert digests(tmp_path / "deployed") == digests(tmp_path / "simulated")
    found = sorted((tmp_path / "homes").glob("*/privacy/*/ledger"))
    assert len(found) == 2
    assert all(len(path.read_text().splitlines()) == 1 + 2 * 2 for path in found)
    assert "NOT PRIVATE" in (tmp_path / "deployed" / "adapter" / "README.md").read_text()


@pytest.mark.slow
def test_a_spent_budget_ends_a_deployed_run_with_4(make_job, tmp_path):
    job = write_job(
        tmp_path / "job.toml",
        make_job(
            partition={"clients": 2},
            federation={"rounds": 3, "deadline_s": 120.0},
            privacy={"epsilon": 0.5, "noise_multiplier": 0.5, "delta": 1e-3},
        ),
    )
    clients = {f"client-{k:03d}": ["--partition", k] for k in range(2)}
    with Deployed(tmp_path, clients) as deployed:
        done = deployed.run(job, tmp_path / "deployed", check=False)
    assert done.returncode == 4, done.stderr
    assert "privacy budget of the run is epsilon 0.5" in done.stderr
