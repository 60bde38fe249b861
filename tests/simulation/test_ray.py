"""The Ray engine: the bits and bytes of the local one, also when workers die."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

ray = pytest.importorskip("ray", reason="the Ray engine needs the extra `ray`")

from fedlora.config.job import Job  # noqa: E402
from fedlora.config.load import dump_job  # noqa: E402
from fedlora.errors import ConfigError  # noqa: E402
from fedlora.models.loaded import load  # noqa: E402
from fedlora.simulation.ray_cluster import Cluster  # noqa: E402
from fedlora.simulation.ray_pool import Pool  # noqa: E402
from tests.cli.command import fedlora  # noqa: E402
from tests.simulation.runs import Run  # noqa: E402

TROUBLED = {
    "dropout": 0.2,
    "stragglers": 0.2,
    "slowdown": 9.0,
    "ranks": [2, 1],
    "hostile": [
        {"kind": "nan", "clients": ["client-000", "client-003"]},
        {"kind": "shift", "clients": ["client-001"], "strength": 0.5},
        {"kind": "label-flip", "clients": ["client-002"]},
    ],
}
KEEPS = {
    "federation": {"strategy": "rolora", "rounds": 4, "quorum": 1, "deadline_s": 10.0},
    "partition": {"clients": 6},
    "scenario": TROUBLED,
    "training": {"optimizer_state": "keep", "momentum": 0.5},
    "adapter": {"dropout": 0.1},
}
# what the folders of equal runs differ in: the engine's name, clocks and random lineage ids
OWN = {"HEAD", "job.toml", "metrics.jsonl", "round.json"}


@pytest.fixture(scope="module")
def pool():
    """Two workers that all tests share: starting one takes as long as importing torch."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDLORA_RAY_WORKERS", "2")
        patch.delenv("RAY_ADDRESS", raising=False)
        made = Pool(Cluster(Job(), 2))
    yield made
    made.close()
    assert not ray.is_initialized()


@pytest.fixture
def both(make_job, tmp_path, pool):
    """The same job for both engines."""

    def make(loaded=None, **sections):
        local = Run(make_job(**sections), tmp_path / "local", loaded)
        run = {**sections.get("run", {}), "engine": "ray"}
        return local, Run(
            make_job(**{**sections, "run": run}), tmp_path / "ray", local.loaded, pool=pool
        )

    return make


def kept(run):
    """Every file of a run that says nothing of engine, clock or lineage."""
    files = (path for path in run.folder.rglob("*") if path.is_file() and path.name not in OWN)
    return {str(path.relative_to(run.folder)): path.read_bytes() for path in files}


def told(run):
    """metrics.jsonl but for engine, clock and resumes."""
    lines = [line for line in run.lines() if line["event"] != "resume"]
    return [{k: v for k, v in line.items() if k != "engine"} for line in lines]


def same(local, other):
    assert other.adapters() == local.adapters()
    assert len(set(local.adapters())) > 1
    assert told(other) == told(local)
    assert kept(other) == kept(local)


def same_runs(local, other):
    local.go()
    other.go()
    same(local, other)


def test_a_troubled_run_is_that_of_the_local_engine_bit_for_bit(both):
    """Absent, slow, unequal and hostile clients, kept moments, bytes and what clients hold."""
    local, other = both(**KEEPS)
    local.go()
    assert {e["code"] for e in local.of("rejected")} == {"NOT_FINITE"}
    assert any(e["missing"] for e in local.of("round"))
    assert {name.split("/")[0] for name in kept(local)} >= {"clients", "held.json", "rounds"}
    for until in (2, 3, None):
        other.go(until)
    same(local, other)
    starts = [line["engine"] for run in (local, other) for line in run.lines()[:1]]
    assert starts == ["local", "ray"]


@pytest.mark.parametrize(("strategy", "moments"), [("fedsa-lora", "keep"), ("flora", "reset")])
def test_parts_that_stay_or_are_folded_travel_alike(both, strategy, moments):
    same_runs(*both(federation={"strategy": strategy}, training={"optimizer_state": moments}))


def test_control_variates_travel_with_the_task(both):
    sections = {
        "federation": {"wrappers": [{"name": "scaffold"}]},
        "training": {"optimizer": "sgd", "learning_rate": 0.1},
    }
    same_runs(*both(**sections))


def test_an_asynchronous_run_is_that_of_the_local_engine(both):
    """Work is done before it is due, and what is no longer waited for leaves no trace."""
    sections = {
        "federation": {"mode": "async", "buffer": 2, "rounds": 6, "max_staleness": 1},
        "partition": {"clients": 6},
        "scenario": {"stragglers": 0.4, "slowdown": 6.0, "dropout": 0.1},
        "training": {"optimizer_state": "keep"},
    }
    local, other = both(**sections)
    local.go()
    assert {e["code"] for e in local.of("rejected")} == {"STALE"}
    other.go()
    same(local, other)


@pytest.fixture
def wide(tiny_folder, tmp_path):
    """A model whose sums are wide enough to differ with the number of threads."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    tokenizer.save_pretrained(tmp_path / "wide")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=768,
                intermediate_size=1024,
                num_hidden_layers=1,
                num_attention_heads=4,
                max_position_embeddings=32,
                pad_token_id=0,
            )
        ).save_pretrained(tmp_path / "wide")
    yield str(tmp_path / "wide")
    torch.set_num_threads(1)


def test_workers_use_the_threads_of_the_job(both, make_job, tmp_path, wide):
    sections = {"model": {"name": wide}, "federation": {"rounds": 2}}
    one = Run(make_job(**sections), tmp_path / "one")
    one.go()
    local, other = both(
        load(make_job(**sections, run={"threads": 2})), **sections, run={"threads": 2}
    )
    local.go()
    torch.set_num_threads(1)
    assert local.adapters() != one.adapters()
    torch.set_num_threads(2)
    other.go()
    assert other.adapters() == local.adapters()


def test_a_killed_worker_changes_nothing(both, pool):
    sections = {"partition": {"clients": 5}, "training": {"local_steps": 20}}
    local, other = both(**sections, federation={"rounds": 2})
    before, killed = pool.deaths, []

    def kill(client):
        if not killed:
            (pid,) = (pid for pid, clients in pool.at_work().items() if client in clients)
            killed.append(pid)
            os.kill(pid, signal.SIGKILL)

    local.go()
    other.go(progress=kill)
    assert pool.deaths == before + 1
    same(local, other)
    assert killed[0] not in pool.at_work()


def test_an_interrupted_round_is_done_again(both, pool):
    local, other = both(**KEEPS)
    given = []

    def press(client):
        given.append(client)
        if len(given) == 7:
            raise KeyboardInterrupt

    local.go()
    with pytest.raises(KeyboardInterrupt):
        other.go(progress=press)
    assert 1 <= len(other.of("round")) < 4
    other.go()
    same(local, other)
    assert pool.taken == 0


def test_few_errands_are_at_work_however_many_clients_there_are(both, pool):
    _, other = both(partition={"clients": 20}, federation={"rounds": 1})
    at_once = []
    other.go(progress=lambda client: at_once.append(pool.taken))
    assert len(at_once) == 20
    assert max(at_once) <= pool.most < 20
    assert max(len(clients) for clients in pool.at_work().values()) == 0


def test_a_worker_with_other_data_than_the_server_is_refused(both, make_job):
    _, other = both()
    data = other.loaded.data
    fewer = {n: replace(c, train=c.train[1:]) for n, c in data.clients.items()}
    other.loaded = replace(other.loaded, data=replace(data, clients=fewer))
    with pytest.raises(
        ConfigError, match=r"worker on .* has 13 examples of client 'client-000', the server 12"
    ):
        other.go()


def test_clients_that_no_worker_knows_are_refused(both):
    _, other = both()
    other.clients = {n: replace(c) for n, c in other.loaded.data.clients.items()}
    with pytest.raises(ConfigError, match="the clients of the job's own data"):
        other.go()


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


def test_a_cluster_that_cannot_hold_a_worker_is_refused(pool):
    job = Job.model_validate({"run": {"threads": 64}})
    with pytest.raises(ConfigError, match=r"2 processors .* run\.threads = 64"):
        Cluster(job, 2)


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


@pytest.mark.slow
def test_a_client_that_kills_every_worker_is_left_out(both, pool):
    sections = {"training": {"local_steps": 50}, "federation": {"rounds": 1, "quorum": 2}}
    _, other = both(**sections)

    def kill(client):
        if client == "client-001":
            (pid,) = (pid for pid, clients in pool.at_work().items() if client in clients)
            os.kill(pid, signal.SIGKILL)

    before = pool.deaths
    other.go(progress=kill)
    assert pool.deaths == before + 3
    (rejected,) = other.of("rejected")
    assert (rejected["client"], rejected["code"]) == ("client-001", "CLIENT_ERROR")
    assert "died 3 times" in rejected["detail"]
    (done,) = other.of("round")
    assert done["clients"] == ["client-000", "client-002"]
