"""The repository as a Flower app under Flower's own commands, with nothing of ours started."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.deployed.federation import call, digests, free_port, write_job

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
CLIENTS = 2
LONGEST_S = 1200.0


class Flower:
    """Flower's commands with a home of their own; use as a context manager."""

    def __init__(self, folder):
        self.folder = folder
        self.processes = []
        self.environment = {
            **os.environ,
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
            "FLWR_HOME": str(folder / "flwr"),
            "FEDLORA_HOME": str(folder / "home"),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(free_port()),
        }
        self.environment.pop("FEDLORA_SERVER_HOME", None)
        (folder / "flwr").mkdir()

    def start(self, *words):
        """A command in the background."""
        name = f"{len(self.processes)}-{words[0]}.log"
        with (self.folder / name).open("wb") as log:
            self.processes.append(
                subprocess.Popen(
                    [str(BIN / words[0]), *map(str, words[1:])],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=self.environment,
                )
            )

    def run(self, link, config, *options):
        """`flwr run .` of the repository, until the run is over."""
        given = " ".join(f"{name}='{value}'" for name, value in config.items())
        return subprocess.run(
            [BIN / "flwr", "run", ".", link, "--run-config", given, "--stream", *options],
            cwd=ROOT,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=LONGEST_S,
            check=False,
        )

    def said(self):
        logs = [*self.folder.glob("*.log"), *self.folder.glob("flwr/*/*.log")]
        return "\n".join(f"== {path}\n{path.read_text()[-3000:]}" for path in logs)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.processes:
            process.send_signal(signal.SIGTERM)
        for process in self.processes:
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        # workers outlive the nodes that start them, and so does the SuperLink of a simulation
        for pid in running_with(str(self.folder)):
            os.kill(pid, signal.SIGTERM)


def running_with(word):
    """Process ids whose command line has `word` in it."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes()
        except OSError:
            continue
        if word.encode() in command:
            found.append(int(path.parent.name))
    return found


def until(what, holds, flower):
    ends = time.monotonic() + LONGEST_S
    while not holds():
        assert time.monotonic() < ends, f"{what} did not come\n{flower.said()}"
        time.sleep(0.1)


@pytest.fixture
def flower(tmp_path):
    with Flower(tmp_path) as made:
        yield made


@pytest.fixture
def config(make_job, tmp_path):
    """The app's configuration: a job, whose simulation is there, and where the run goes."""
    job = make_job(
        partition={"clients": CLIENTS}, federation={"rounds": 2, "deadline_s": LONGEST_S}
    )
    path = write_job(tmp_path / "job.toml", job)
    call("simulate", path, "--out", tmp_path / "simulated")
    return {"job": path, "out": tmp_path / "run"}


def test_superlink_and_supernodes_give_the_adapter_of_a_simulation(flower, config, tmp_path):
    link, nodes = free_port(), [free_port() for _ in range(CLIENTS)]
    flower.start("flower-superlink", "--insecure", "--port", link)
    at = f"127.0.0.1:{link}"
    for place, port in enumerate(nodes):
        own = f"partition-id={place} num-partitions={CLIENTS}"
        options = ["--superlink", at, "--port", port, "--node-config", own]
        flower.start("flower-supernode", "--insecure", *options)
    (tmp_path / "flwr" / "config.toml").write_text(
        f'[superlink]\ndefault = "here"\n[superlink.here]\naddress = "{at}"\ninsecure = true\n'
    )
    until("the SuperLink", lambda: "startup complete" in flower.said(), flower)
    done = flower.run("here", config)
    assert done.returncode == 0, done.stdout + done.stderr + flower.said()
    assert ended(config["out"]), done.stdout + flower.said()
    assert digests(config["out"]) == digests(tmp_path / "simulated")


def test_flowers_own_simulation_gives_the_adapter_of_ours(flower, config, tmp_path):
    pytest.importorskip("ray")
    done = flower.run("local", config, "--federation-config", f"num-supernodes={CLIENTS}")
    assert done.returncode == 0, done.stdout + done.stderr + flower.said()
    assert ended(config["out"]), done.stdout + flower.said()
    assert digests(config["out"]) == digests(tmp_path / "simulated")


def ended(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return json.loads(lines[-1])["event"] == "end"
