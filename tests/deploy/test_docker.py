"""docker-compose.yml on a real engine: the image, a run to its end, and one whose server dies.

Oracle: `fedlora simulate` of the same job inside the same image, bit for bit.
"""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROJECT = "fedlora-test"
IMAGE = "fedlora:test"
LONGEST_S = 1800
OVERRIDES = ["federation.rounds=3", "training.local_steps=4"]


def has_engine():
    if not shutil.which("docker") or not shutil.which("docker-compose"):
        return False
    return subprocess.run(["docker", "info"], capture_output=True, check=False).returncode == 0


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not has_engine(), reason="no Docker engine, or no docker-compose"),
]


def call(*words, check=True, **variables):
    done = subprocess.run(
        words,
        cwd=ROOT,
        env={**os.environ, "COMPOSE_PROJECT_NAME": PROJECT, "VERSION": "test", **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=LONGEST_S,
        check=False,
    )
    assert not check or done.returncode == 0, done.stdout[-6000:]
    return done


def compose(*words, **options):
    return call("docker-compose", *words, **options)


def inside(script, *options):
    """What a shell in a fresh container of the image prints."""
    words = ("docker", "run", "--rm", "--entrypoint", "sh", *options, IMAGE, "-c", script)
    return call(*words).stdout


def container(service):
    return compose("ps", "-q", service).stdout.split()[0]


def adapters(name):
    """SHA-256 of the adapter after every round, and of the file at the end."""
    volume = ("--volume", f"{PROJECT}_runs:/runs:ro")
    events = map(json.loads, inside(f"cat /runs/{name}/metrics.jsonl", *volume).splitlines())
    file = inside(f"sha256sum /runs/{name}/adapter/adapter_model.safetensors", *volume).split()[0]
    return [e["adapter_sha256"] for e in events if e["event"] == "round"], file


def simulate(name, clients):
    """The job of `docker/run.sh`, simulated inside the image."""
    overrides = [*OVERRIDES, f"partition.clients={clients}", "partition.kind=dirichlet"]
    words = " ".join(f"--override {o}" for o in [*overrides, "evaluation.baselines=[]"])
    where = "python -c 'import fedlora; print(*fedlora.__path__, sep=\"\")'"
    job = f"$({where})/config/quickstart.toml"
    script = f"fedlora simulate {job} --out /runs/{name} {words}"
    inside(script, "--volume", f"{PROJECT}_runs:/runs")


@pytest.fixture(scope="module")
def image():
    compose("build", "server")
    yield IMAGE
    call("docker", "image", "rm", IMAGE, check=False)


@pytest.fixture
def project(image):
    compose("down", "--volumes")
    yield
    compose("down", "--volumes")
    left = call("docker", "volume", "ls", "--quiet", "--filter", f"name={PROJECT}_").stdout
    assert left == ""


def test_the_image_has_no_root_and_builds_nothing(image):
    assert inside("id -u").strip() == "10001"
    tools = "gcc cc g++ clang make cmake ld as cargo rustc"
    assert inside(f"command -v {tools} || true").strip() == ""
    assert inside("find /opt/fedlora -name '*.pyc' -path '*fedlora/cli/*' | head -1").strip()
    assert inside("touch /opt/fedlora/x 2>&1 || echo refused").endswith("refused\n")


def test_up_trains_to_the_end_with_the_bits_of_a_simulation(project):
    """Mutual TLS, two clients, and the exit code of the run."""
    up = ("up", "--no-color", "--abort-on-container-exit", "--exit-code-from", "run")
    compose(*up, RUN="deployed", OVERRIDES=" ".join(OVERRIDES))
    simulate("simulated", 2)
    rounds, file = adapters("deployed")
    assert len(rounds) == 3
    assert (rounds, file) == adapters("simulated")


def test_a_run_of_three_clients_survives_the_death_of_its_server(project):
    """Every process of the server is killed outright after the first round."""
    variables = {"RUN": "deployed", "OVERRIDES": " ".join(OVERRIDES)}
    compose("up", "--no-color", "--detach", "--scale", "client=3", **variables)
    run, server = container("run"), container("server")
    assert len(compose("ps", "-q", "client").stdout.split()) == 3
    with subprocess.Popen(
        ["docker", "logs", "--follow", run], stdout=subprocess.PIPE, text=True
    ) as follower:
        assert follower.stdout is not None
        for line in follower.stdout:
            if line.startswith("round 1/"):
                # all but the first process, which ends with its child, and with it the container
                call("docker", "exec", server, "sh", "-c", "kill -9 -1", check=False)
                break
        follower.kill()
    code = call("docker", "wait", run).stdout.strip()
    assert code == "0", call("docker", "logs", run).stdout + call("docker", "logs", server).stdout
    restarts = call("docker", "inspect", "--format", "{{.RestartCount}}", server).stdout
    assert int(restarts) == 1
    simulate("simulated", 3)
    assert adapters("deployed") == adapters("simulated")


def test_no_key_leaves_the_volume_of_its_owner(project):
    """After a start: who holds a private key, and which."""
    # a run starts once the clients are healthy
    compose("up", "--no-color", "--detach", "run", OVERRIDES="federation.rounds=1")
    found = {}
    for volume in ("server", "operator", "enrol", "clients"):
        mount = ("--volume", f"{PROJECT}_{volume}:/volume:ro")
        names = inside("cd /volume && grep -rl 'PRIVATE KEY' . | sort", *mount).split()
        found[volume] = {name.rpartition("/")[2] for name in names if name.endswith(".key")}
        assert all(
            mode == "600"
            for mode in inside(
                "cd /volume && grep -rl 'PRIVATE KEY' . | xargs -r stat -c %a", *mount
            ).split()
        )
    assert found["server"] == {"ca.key", "server.key"}
    assert found["operator"] == {"operator.key"}
    assert found["enrol"] == set()
    assert found["clients"] == {"client-000.key", "client-001.key", "node.key"}
