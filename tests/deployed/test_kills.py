"""Processes of a deployed run are killed outright; the adapter is that of a simulation."""

import os
import signal
import time
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
# a kill comes at a random moment of a round, up to so many seconds after its begin
JITTER_S = 3.0


def make_kill_job(make_job, path, rounds):
    return write_job(
        path,
        make_job(
            partition={"clients": 2},
            federation={"rounds": rounds, "deadline_s": 150.0},
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


def killed_and_equal(make_job, tmp_path, kills, delays):
    """Kills `kills` in turn, each in a round of its own, and compares with a simulation."""
    rounds = len(kills) + 1
    job = make_kill_job(make_job, tmp_path / "job.toml", rounds)
    call("simulate", job, "--out", tmp_path / "simulated")
    clients = {f"client-{k:03d}": ["--partition", k] for k in range(2)}
    with Deployed(tmp_path, clients) as deployed:
        run = deployed.run(job, tmp_path / "out", "--detach").stdout.strip()
        for number, (target, delay) in enumerate(zip(kills, delays, strict=True)):
            deployed.wait_for(
                f"round {number} before the kill of {target}",
                lambda number=number: len(committed(deployed, run)) >= number,
            )
            time.sleep(delay)
            kill(deployed, target)
        done = call("resume", tmp_path / "out", check=False)
        assert done.returncode == 0, done.stderr + deployed.logs()
        numbers = committed(deployed, run)
    assert numbers == list(range(1, rounds + 1))
    assert digests(tmp_path / "out") == digests(tmp_path / "simulated")
    name = Path("adapter") / "adapter_model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "simulated" / name).read_bytes()


def test_a_serverapp_and_a_worker_may_die(make_job, tmp_path):
    killed_and_equal(make_job, tmp_path, ["serverapp", "worker"], [0.0, 0.0])


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_every_process_may_die_at_any_time(make_job, tmp_path, seed):
    """All kinds of processes in one run, in a random order and at random moments."""
    draws = generator(seed, "kills")
    targets = [*SERVER, *CLIENT]
    order = torch.randperm(len(targets), generator=draws).tolist()
    delays = (torch.rand(len(targets), generator=draws) * JITTER_S).tolist()
    killed_and_equal(make_job, tmp_path, [targets[i] for i in order], delays)
