"""Slow, missing, cut-off, foreign and skewed clients of a deployed federation."""

import json
import os
import shutil
import signal
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from threading import Thread

import pytest

from fedlora import __version__
from fedlora.pki.authority import Authority
from fedlora.pki.handout import equip
from fedlora.pki.subject import Subject
from fedlora.storage import write_atomic
from tests.deployed.federation import FEDLORA, Deployed, call, digests, write_job
from tests.faults.nemesis import CLIENTS, tiny_job
from tests.faults.proxy import Proxy, drawn

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
FAKETIME = Path("/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1")
PARTITIONS = {name: ["--partition", place] for place, name in enumerate(CLIENTS)}
LONGEST_S = 1800.0


def job_file(folder: Path, **federation) -> Path:
    job = tiny_job()
    changed = job.federation.model_copy(update=federation)
    return write_job(folder / "job.toml", job.model_copy(update={"federation": changed}))


def events(folder: Path, kind: str) -> list[dict]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


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
            "both clients in a round", lambda: any(not event["missing"] for event in rounds())
        )
        [worker] = deployed.children(CLIENTS[1], "fedlora.client.worker_process")
        os.kill(worker, signal.SIGSTOP)
        before = len(rounds())
        deployed.wait_for(
            "a round without it",
            lambda: any(CLIENTS[1] in event["missing"] for event in rounds()[before:]),
        )
        os.kill(worker, signal.SIGCONT)
        without = len(rounds())
        following.join()
        found = events(out, "round")
        assert len(found) == tiny_job().federation.rounds, deployed.logs()
    assert any(CLIENTS[1] in event["missing"] for event in found)
    assert any(CLIENTS[1] in event["clients"] for event in found[without:])


@pytest.mark.parametrize("repetition", range(5))
def test_too_few_clients_end_the_run_at_the_deadline(tmp_path, repetition):
    job = job_file(tmp_path, deadline_s=60.0)
    with Deployed(tmp_path, {CLIENTS[0]: ["--partition", 0]}) as deployed:
        done = deployed.run(job, tmp_path / "out", check=False)
    assert done.returncode == 3
    assert "1 of 2 clients joined within federation.deadline_s = 60 s" in done.stderr
    assert "fedlora resume" in done.stderr


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


class Strangers:
    """A server with TLS, and clients that it should not have."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.deployed = Deployed(folder, {})

    def client(self, name: str, *security: object, code: Path = ROOT, **environment: str) -> str:
        """Runs a client, of the fedlora in `code`, that must be refused; what it said."""
        options = ["--server", self.deployed.address, "--name", name, "--partition", 0]
        options += ["--home", self.folder / "homes" / name]
        done = subprocess.run(
            [*FEDLORA, "client", *map(str, [*options, *security])],
            capture_output=True,
            text=True,
            timeout=120.0,
            # the folder in which -m starts is the first where Python looks
            cwd=code,
            env={**os.environ, "PYTHONPATH": str(code), **environment},
            check=False,
        )
        assert done.returncode == 2, done.stdout + done.stderr
        return done.stderr

    def certificate(self, name: str, ca: Path | None = None, **times) -> list[object]:
        authority = Authority(ca or self.folder / "ca")
        given = {"now": datetime.now(UTC), **times}
        equip(authority, Subject(name, "client"), self.folder / "certs" / name, **given)
        return ["--certs", self.folder / "certs" / name]


@pytest.fixture(scope="module")
def strangers(tmp_path_factory):
    made = Strangers(tmp_path_factory.mktemp("strangers"))
    with made.deployed:
        made.deployed.wait_for(
            "the exchange", lambda: made.deployed.children("server", "exchange_process")
        )
        yield made


@pytest.mark.parametrize("repetition", range(5))
def test_another_authority_is_refused(strangers, repetition):
    name = f"foreign-{repetition}"
    other = strangers.folder / f"ca-{repetition}"
    call("certs", "init", other)
    assert "CA" in strangers.client(name, *strangers.certificate(name, other))


@pytest.mark.parametrize("repetition", range(5))
def test_an_expired_certificate_is_refused(strangers, repetition):
    name = f"expired-{repetition}"
    made = strangers.certificate(
        name, now=datetime.now(UTC) - timedelta(minutes=4), lifetime=timedelta(minutes=1)
    )
    assert "expired" in strangers.client(name, *made)


@pytest.mark.parametrize("repetition", range(5))
def test_a_revoked_certificate_is_refused(strangers, repetition):
    name = f"revoked-{repetition}"
    made = strangers.certificate(name)
    call("certs", "revoke", name, "--ca", strangers.folder / "ca")
    assert "revoked" in strangers.client(name, *made)


@pytest.mark.parametrize("repetition", range(5))
def test_plain_text_is_refused(strangers, repetition):
    assert "TLS" in strangers.client(f"plain-{repetition}", "--insecure")


@pytest.mark.parametrize("repetition", range(5))
def test_another_version_is_refused_with_both_named(strangers, tmp_path, repetition):
    name = f"older-{repetition}"
    shutil.copytree(ROOT / "fedlora", tmp_path / "fedlora")
    init = tmp_path / "fedlora" / "__init__.py"
    init.write_text(init.read_text().replace(__version__, "0.0.9"))
    made = strangers.certificate(name)
    said = strangers.client(name, *made, code=tmp_path)
    assert "'0.0.9'" in said
    assert __version__ in said


@pytest.mark.skipif(not FAKETIME.is_file(), reason="needs libfaketime")
@pytest.mark.parametrize("skew", ["+10s", "+10m", "-10m"])
def test_a_clock_that_is_too_far_off_is_named(strangers, skew):
    name = f"skewed{skew}"
    made = strangers.certificate(name, now=datetime.now(UTC) - timedelta(minutes=15))
    assert "clock" in strangers.client(name, *made, **faked(skew))


@pytest.mark.skipif(not FAKETIME.is_file(), reason="needs libfaketime")
@pytest.mark.parametrize("skew", ["-10s", "+3s"])
def test_a_clock_that_is_a_little_off_changes_no_bit(tmp_path, simulated, monkeypatch, skew):
    """Deadlines are measured, not told."""
    with Deployed(tmp_path, {CLIENTS[0]: ["--partition", 0]}) as deployed:
        for name, value in faked(skew).items():
            monkeypatch.setenv(name, value)
        deployed.clients[CLIENTS[1]] = ["--partition", 1]
        deployed.start_client(CLIENTS[1])
        monkeypatch.undo()
        done = deployed.run(job_file(tmp_path), tmp_path / "out", check=False, longest_s=LONGEST_S)
        assert done.returncode == 0, done.stderr + deployed.logs()
    assert digests(tmp_path / "out") == simulated


def faked(skew: str) -> dict[str, str]:
    """The environment of a process whose clock is off."""
    assert sys.platform == "linux"
    return {"LD_PRELOAD": str(FAKETIME), "FAKETIME": skew}
