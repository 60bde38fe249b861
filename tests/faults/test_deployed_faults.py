"""Slow, missing, cut-off and skewed clients of a deployed federation."""

import json
import os
import signal
from pathlib import Path
from threading import Thread

import pytest

from fedlora.storage import write_atomic
from tests.deployed.federation import Deployed, call, digests, write_job
from tests.faults.clocks import FAKETIME, faked, waits_end
from tests.faults.nemesis import CLIENTS, tiny_job
from tests.faults.proxy import Proxy, drawn

pytestmark = pytest.mark.slow

PARTITIONS = {name: ["--partition", place] for place, name in enumerate(CLIENTS)}
LONGEST_S = 1800.0


def job_file(folder: Path, **federation) -> Path:
    job = tiny_job()
    changed = job.federation.model_copy(update=federation)
    return write_job(folder / "job.toml", job.model_copy(update={"federation": changed}))


def journal(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def events(folder: Path, kind: str) -> list[dict]:
    return [event for event in journal(folder / "metrics.jsonl") if event["event"] == kind]


@pytest.fixture(scope="module")
def simulated(tmp_path_factory):
    """Digests of the undisturbed run's adapters."""
    folder = tmp_path_factory.mktemp("simulated")
    call("simulate", job_file(folder), "--out", folder / "out")
    return digests(folder / "out")


@pytest.mark.parametrize("repetition", range(5))
def test_a_stopped_client_is_left_behind_and_is_back_later(tmp_path, repetition):
    """SIGSTOP of its worker: rounds close at the deadline with the quorum."""
    # of which a healthy client's round takes a small part, also on a busy machine
    job = job_file(tmp_path, deadline_s=90.0, quorum=1)
    out = tmp_path / "out"
    with Deployed(tmp_path, PARTITIONS) as deployed:
        following = Thread(
            target=lambda: deployed.run(job, out, check=False, longest_s=LONGEST_S), daemon=True
        )
        following.start()
        journals = tmp_path / "server" / "runs"

        def rounds() -> list[dict]:
            return [e for folder in journals.glob("*") for e in events(folder, "round")]

        def journal_is_there() -> bool:
            return bool(list(journals.glob("*/metrics.jsonl")))

        deployed.wait_for("a journal", journal_is_there)
        deployed.wait_for(
            "both clients in a round",
            lambda: any(set(event["clients"]) == set(CLIENTS) for event in rounds()),
        )
        [worker] = deployed.children(CLIENTS[1], "fedlora.client.worker_process")
        os.kill(worker, signal.SIGSTOP)
        before = len(rounds())
        deployed.wait_for(
            "a round without it",
            lambda: any(CLIENTS[1] not in event["clients"] for event in rounds()[before:]),
        )
        os.kill(worker, signal.SIGCONT)
        without = len(rounds())
        following.join()
        found = events(out, "round")
        assert len(found) == tiny_job().federation.rounds, deployed.logs()
    # silent until the deadline, or refused by a ClientApp that found no worker
    assert any(CLIENTS[1] not in event["clients"] for event in found)
    assert any(CLIENTS[1] in event["clients"] for event in found[without:])


@pytest.mark.parametrize("repetition", range(5))
def test_too_few_clients_end_the_run_at_the_deadline(tmp_path, repetition):
    job = job_file(tmp_path, deadline_s=60.0)
    with Deployed(tmp_path, {CLIENTS[0]: ["--partition", 0]}) as deployed:
        done = deployed.run(job, tmp_path / "out", check=False)
    assert done.returncode == 3
    assert "1 of 2 clients joined within federation.deadline_s = 60 s" in done.stderr
    assert "fedlora resume" in done.stderr


@pytest.mark.parametrize("repetition", range(5))
def test_a_round_below_quorum_ends_the_run_which_goes_on_when_clients_are_back(
    tmp_path, simulated, repetition
):
    """A client is stopped amid the run: the round is tried three times, and changes nothing."""
    job = job_file(tmp_path, deadline_s=60.0)
    out = tmp_path / "out"
    ended = []
    with Deployed(tmp_path, PARTITIONS) as deployed:
        following = Thread(
            target=lambda: ended.append(deployed.run(job, out, check=False, longest_s=LONGEST_S)),
            daemon=True,
        )
        following.start()
        journals = tmp_path / "server" / "runs"

        def told() -> list[dict]:
            return [e for path in journals.glob("*/metrics.jsonl") for e in journal(path)]

        deployed.wait_for("a round", lambda: any(e["event"] == "round" for e in told()))
        client = deployed.processes[CLIENTS[1]]
        client.send_signal(signal.SIGTERM)
        client.wait(60)
        following.join()
        [done] = ended
        assert done.returncode == 3, done.stderr + deployed.logs()
        [*before, last] = told()
        assert (last["event"], last["exit_code"]) == ("failed", 3)
        standing = max(e["round"] for e in before if e["event"] == "round")
        assert standing < tiny_job().federation.rounds
        tried = [e for e in before if e["event"] == "abandoned" and e["round"] == standing + 1]
        assert [e["attempt"] for e in tried] == list(range(1 + tiny_job().federation.retries))
        deployed.start_client(CLIENTS[1])
        again = call("resume", out, check=False, longest_s=LONGEST_S)
        assert again.returncode == 0, again.stderr + deployed.logs()
    assert digests(out) == simulated


@pytest.mark.parametrize("seed", range(5))
def test_transfers_through_a_bad_network_change_no_bit(tmp_path, simulated, seed):
    """Every kind of broken connection between the workers and the exchange."""
    job = job_file(tmp_path)
    with Deployed(tmp_path, PARTITIONS) as deployed:
        settings = tmp_path / "server" / "server.json"
        deployed.wait_for("the server's settings", settings.is_file)
        # about three connections of each round break
        proxy = Proxy(deployed.port, drawn(seed, 30, 25_000))
        kept = {**json.loads(settings.read_text()), "exchange": f":{proxy.port}"}
        write_atomic(settings, json.dumps(kept).encode())
        done = deployed.run(job, tmp_path / "out", check=False, longest_s=LONGEST_S)
        assert done.returncode == 0, done.stderr + deployed.logs()
        proxy.close()
    assert digests(tmp_path / "out") == simulated
    assert proxy.connections > 2 * tiny_job().federation.rounds


@pytest.mark.skipif(not FAKETIME.is_file(), reason="needs libfaketime")
@pytest.mark.parametrize("skew", ["-10s", "+3s"])
def test_a_clock_that_is_a_little_off_changes_no_bit(tmp_path, simulated, monkeypatch, skew):
    """Deadlines are measured, not told."""
    if not waits_end(skew):
        pytest.skip("this libfaketime lets no process wait; use another one")
    with Deployed(tmp_path, {CLIENTS[0]: ["--partition", 0]}) as deployed:
        for name, value in faked(skew).items():
            monkeypatch.setenv(name, value)
        deployed.clients[CLIENTS[1]] = ["--partition", 1]
        deployed.start_client(CLIENTS[1])
        monkeypatch.undo()
        done = deployed.run(job_file(tmp_path), tmp_path / "out", check=False, longest_s=LONGEST_S)
        assert done.returncode == 0, done.stderr + deployed.logs()
    assert digests(tmp_path / "out") == simulated
