"""Clients that a deployed federation must not have: refused by name, and never a node."""

import os
import shutil
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest
from flwr.proto.control_pb2 import ListNodesRequest
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor

from fedlora import __version__
from fedlora.pki.authority import Authority
from fedlora.pki.handout import equip
from fedlora.pki.subject import Subject
from tests.deployed.federation import FEDLORA, Deployed, call
from tests.faults.clocks import FAKETIME, faked

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


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
        assert name not in self.nodes()
        return done.stderr

    def nodes(self) -> set[str]:
        """Names of all nodes that Flower knows."""
        link = ControlHttpClient.from_server_address(
            server_address=f"127.0.0.1:{self.deployed.flower_port}",
            insecure=False,
            root_certificates=str(self.folder / "ca" / "ca.crt"),
            interceptors=[RuntimeVersionHttpInterceptor(component_name="flwr CLI")],
        )
        try:
            return {node.name for node in link.ListNodes(ListNodesRequest()).nodes_info}
        except httpx.TransportError:
            # it is still on its way up
            return set()
        finally:
            link.close()

    def certificate(self, name: str, ca: Path | None = None, **times) -> list[object]:
        authority = Authority(ca or self.folder / "ca")
        given = {"now": datetime.now(UTC), **times}
        equip(authority, Subject(name, "client"), self.folder / "certs" / name, **given)
        return ["--certs", self.folder / "certs" / name]


@pytest.fixture(scope="module")
def strangers(tmp_path_factory):
    made = Strangers(tmp_path_factory.mktemp("strangers"))
    with made.deployed:
        # a friend, so that a list of nodes without strangers says something
        made.deployed.clients["friend"] = ["--partition", 0]
        made.deployed.start_client("friend")
        made.deployed.wait_for("a node", lambda: "friend" in made.nodes())
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
