"""Processes of a deployed run are killed outright; the adapter is that of a simulation."""

import os
import signal
from pathlib import Path

import pytest
import torch

from fedlora.seeds import generator
from fedlora.server.journal import Journal
from tests.deployed.federation import Deployed, call, digests, write_job

# process -> part of its command line, of the server's processes or of a client's
SERVER = {
    "serverapp": "flwr-serverapp",
    "superlink": "fedlora.server.superlink",
    "exchange": "fedlora.server.exchange_process",
    "superexec": "flower-superexec",
}
CLIENT = {
    "worker": "fedlora.client.worker_process",
    "supernode": "fedlora.client.supernode",
    "clientapp": "flwr-clientapp",
}
ROUNDS = 4


@pytest.fixture
def job(make_job, tmp_path):
    return write_job(
        tmp_path / "job.toml",
        make_job(
            partition={"clients": 2},
            federation={"rounds": ROUNDS, "deadline_s": 150.0},
            training={"optimizer_state": "keep"},
        ),
    )


def kill(deployed, target):
    """Kills one process of this kind, once there is one."""
    who, part = ("server", SERVER[target]) if target in SERVER else ("client-000", CLIENT[target])
    deployed.wait_for(target, lambda: deployed.children(who, part))
    for pid in deployed.children(who, part)[:1]:
        os.kill(pid, signal.SIGKILL)


def committed(deployed, run):
    journal = Journal(deployed.folder / "server" / "runs" / run / "metrics.jsonl")
    return [e["round"] for e in journal.read() if e["event"] == "round"]


def killed_and_equal(job, tmp_path, kills):
    """Runs the job, kills `kills` in turn, each in a round of its own, and compares."""
    call("simulate", job, "--out", tmp_path / "simulated")
    clients = {f"client-{k:03d}": ["--partition", k] for k in range(2)}
    with Deployed(tmp_path, clients) as deployed:
        run = deployed.run(job, tmp_path / "out", "--detach").stdout.strip()
        for number, target in enumerate(kills):
            deployed.wait_for(
                f"round {number} before the kill of {target}",
                lambda number=number: len(committed(deployed, run)) >= number,
            )
            kill(deployed, target)
        done = call("resume", tmp_path / "out", check=False)
        assert done.returncode == 0, done.stderr + deployed.logs()
        rounds = committed(deployed, run)
    assert rounds == list(range(1, ROUNDS + 1))
    assert digests(tmp_path / "out") == digests(tmp_path / "simulated")
    name = Path("adapter") / "adapter_model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "simulated" / name).read_bytes()


def test_a_serverapp_and_a_worker_may_die(job, tmp_path):
    killed_and_equal(job, tmp_path, ["serverapp", "worker"])


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("target", [*SERVER, *CLIENT])
def test_every_process_may_die_in_any_round(job, tmp_path, target, seed):
    others = [*SERVER, *CLIENT]
    draws = generator(seed, "kills", target)
    second = others[int(torch.randint(len(others), (1,), generator=draws))]
    killed_and_equal(job, tmp_path, [target, second])
