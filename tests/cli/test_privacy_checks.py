"""`fedlora privacy selftest` and `audit`."""

import json

import pytest
from typer.testing import CliRunner

from fedlora.cli.privacy import app
from fedlora.errors import ConfigError, RunFailed
from fedlora.privacy.audit import one_run
from fedlora.privacy.audit.oracles import ORACLES
from fedlora.privacy.mechanism import Mechanism
from tests.privacy.mutants_of_chance import NoNoise


@pytest.fixture
def job(tiny_folder, tiny_csv, tmp_path):
    path = tmp_path / "job.toml"
    path.write_text(
        f'[model]\nname = "{tiny_folder}"\ntask = "sequence-classification"\n'
        f'[data]\nsource = "{tiny_csv}"\nmax_length = 16\n'
        '[partition]\nkind = "iid"\nclients = 3\n'
        '[adapter]\nrank = 2\ntargets = ["q_proj"]\n'
        "[privacy]\nepsilon = 8.0\n"
    )
    return path


def call(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def test_selftest_consults_every_oracle(job):
    done = call("selftest", job, "--json")
    assert done.exception is None
    found = json.loads(done.stdout)
    assert found["passed"]
    assert [row["oracle"] for row in found["oracles"]] == list(ORACLES)
    assert all(row["figure"] <= row["tolerance"] for row in found["oracles"])


def unclipped(mechanism, pieces):
    return {name: piece.whole().sum(0) for name, piece in pieces.items()}


def test_selftest_names_the_oracle_that_fails(job, monkeypatch):
    """An installation whose mechanism does not clip, as a bad patch would leave it."""
    monkeypatch.setattr(Mechanism, "clipped", unclipped)
    done = call("selftest", job)
    assert isinstance(done.exception, RunFailed)
    assert done.exception.exit_code == 3
    assert "oracle 'sensitivity' failed" in str(done.exception)
    assert "FAILED  sensitivity" in done.stdout
    assert "passed  noise scale" in done.stdout


@pytest.mark.parametrize(
    "override", ['privacy.unit="client"', "adapter.dropout=0.1", 'run.engine="ray"']
)
def test_selftest_refuses_what_is_not_private_anyway(job, override):
    done = call("selftest", job, "-o", override)
    assert isinstance(done.exception, ConfigError)
    assert override.partition("=")[0] in str(done.exception)


def test_audit_says_what_it_found():
    done = call("audit", "--json")
    assert done.exception is None
    [run] = json.loads(done.stdout)["runs"]
    assert not run["falsified"]
    assert run["bound"] <= run["claimed"]


def test_audit_fails_when_a_claim_is_refuted(monkeypatch):
    monkeypatch.setattr(one_run.audit, "__defaults__", (NoNoise,))
    done = call("audit")
    assert isinstance(done.exception, RunFailed)
    assert "refuted" in str(done.exception)
