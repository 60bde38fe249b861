"""`docs/certificates.md`: its commands are run, top to bottom, in an empty folder."""

import re
import shlex
import tomllib
from pathlib import Path

from fedlora.client.policy import Policy
from fedlora.config.load import parse_table
from tests.cli.command import fedlora

PAGE = (Path(__file__).parents[1] / "docs" / "certificates.md").read_text("utf-8")


def blocks(kind):
    return re.findall(rf"^```{kind}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def test_every_command_does_what_the_page_says(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    lines = [line for block in blocks("sh") for line in block.splitlines()]
    for line in lines:
        command, _, code = line.partition("# exit ")
        verb, *words = shlex.split(command)
        assert verb == "fedlora"
        done = fedlora(monkeypatch, capsys, *words)
        assert done.code == int(code or 0), done
    assert len(lines) >= 9
    site = set(re.findall(r"^\| `(site-0\.\w+)` \|", PAGE, re.MULTILINE))
    made = {path.name for folder in ("site", "signed") for path in (tmp_path / folder).iterdir()}
    assert made - {"ca.crt"} == site
    for name in re.findall(r"^\| `(ca/[\w./]+)` \|", PAGE, re.MULTILINE):
        assert (tmp_path / name).exists()
    assert (tmp_path / "policy.toml").is_file()


def test_the_policy_on_the_page_is_valid():
    [text] = blocks("toml")
    assert parse_table(Policy, tomllib.loads(text)) != Policy()
