"""examples/flower_app, run by Flower's own simulation as its README says."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import requests
from requests.adapters import HTTPAdapter
from urllib3.util import Retry

pytest.importorskip("ray", reason="Flower's simulation needs the extra `bench`")

ROOT = Path(__file__).parents[2]
APP = ROOT / "examples" / "flower_app"


@pytest.fixture
def superlink(tmp_path):
    """(name of a SuperLink of our own, environment), so that none stays behind."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    home = tmp_path / "flwr"
    home.mkdir()
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "own"\n[superlink.own]\naddress = "127.0.0.1:{port}"\n'
        "insecure = true\n"
    )
    environment = {
        **os.environ,
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    command = ["flower-superlink", "--insecure", "--simulation", "--host", "127.0.0.1"]
    with (home / "log").open("w") as log:
        process = subprocess.Popen(
            [*command, "--port", str(port)], env=environment, stdout=log, stderr=log
        )
    try:
        session = requests.Session()
        session.mount("http://", HTTPAdapter(max_retries=Retry(connect=10, backoff_factor=0.1)))
        session.get(f"http://127.0.0.1:{port}/health", timeout=60).raise_for_status()
        yield "own", environment
    finally:
        process.terminate()
        process.wait(60)


@pytest.mark.slow
def test_the_example_learns_with_the_command_of_its_readme(superlink):
    name, environment = superlink
    readme = (APP / "README.md").read_text()
    options = ["--stream", "--federation-config", "num-supernodes=4"]
    for strategy in ("lora-fair", "rolora"):
        extra = ["-c", f'strategy="{strategy}"'] if strategy != "lora-fair" else []
        shown = "flwr run . --stream --federation-config 'num-supernodes=4'"
        assert shown + (f" -c '{extra[1]}'" if extra else "") in readme.splitlines()
        done = subprocess.run(
            ["flwr", "run", ".", name, *options, *extra],
            cwd=APP,
            env=environment,
            capture_output=True,
            text=True,
            timeout=500,
            check=False,
        )
        text = done.stdout + done.stderr
        assert done.returncode == 0, text
        losses = [float(found) for found in re.findall(r"^round \d: loss (\S+)$", text, re.M)]
        assert len(losses) == 6, text
        assert losses[-1] < 0.5 * losses[0], text
        assert text.count("aggregate_train: 4 usable replies, 0 failures") == 5
