"""A SuperNode of ours takes bundles that name the installed app, and none that bring code."""

import io
import zipfile
from pathlib import Path

import flwr.supernode.start_client_internal as node
import pytest
from flwr.cli.build import build_fab_from_files
from flwr.supercore.run import RunNotRunningException

from fedlora.client.supernode import READ_CONFIG, _checked, problem
from fedlora.server.control import bundle

OURS = bundle({"run": "0123456789abcdef"})


def with_file(name, content=b"print('mine now')"):
    changed = io.BytesIO(OURS)
    with zipfile.ZipFile(changed, "a") as files:
        files.writestr(name, content)
    return changed.getvalue()


def test_what_the_server_sends_is_taken():
    assert problem(OURS) == ""


@pytest.mark.parametrize(
    "name", ["fedlora/client/flower.py", "sitecustomize.py", "../x.py", "a.so", "data.json"]
)
def test_anything_besides_the_description_is_refused(name):
    assert "holds" in problem(with_file(name))


def test_another_app_is_refused():
    text = zipfile.ZipFile(io.BytesIO(OURS)).read("pyproject.toml").decode()
    other = text.replace("fedlora.client.flower:app", "os:system").encode()
    fab = build_fab_from_files({"pyproject.toml": other})[0]
    assert "os:system" in problem(fab)


@pytest.mark.parametrize("data", [b"", b"PK", OURS[:-9], OURS[:40]])
def test_what_is_no_bundle_is_refused(data):
    assert "cannot be read" in problem(data)


def test_flower_looks_into_bundles_by_the_function_that_is_guarded():
    """Otherwise the guard would stand beside the door."""
    assert f"{READ_CONFIG}(" in Path(node.__file__).read_text()
    guarded = _checked(lambda content, run: (content, run))
    assert guarded(OURS, 1) == (OURS, 1)
    with pytest.raises(RunNotRunningException):
        guarded(with_file("evil.py"), 1)
