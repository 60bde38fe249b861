"""A tiny job on the builtin model, and one finished run of it."""

from pathlib import Path

import pytest

JOB = """
[data]
max_length = 32
max_rows = 40
max_validation = 4
[partition]
clients = 3
[adapter]
rank = 2
targets = ["q_proj", "v_proj"]
[training]
local_steps = 1
batch_size = 2
[federation]
rounds = 2
"""


@pytest.fixture(scope="session")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("job") / "job.toml"
    path.write_text(JOB)
    return path


@pytest.fixture(scope="session")
def finished(job: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run folder; copy it before changing it."""
    from fedlora.cli.simulate import run_simulate

    folder = tmp_path_factory.mktemp("runs") / "finished"
    run_simulate(job, folder, [], as_json=True)
    return folder
