"""`docs/writing-a-strategy.md`: what it shows is run, top to bottom, in an empty folder."""

import re
import shlex
import sys
from pathlib import Path

import pytest

from tests.cli.command import fedlora

GUIDE = Path(__file__).parents[1] / "docs" / "writing-a-strategy.md"
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def plain(text):
    return " ".join(text.split())


def test_every_block_of_the_guide_does_what_it_says(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    # a plug-in of the guide imports the one beside it
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    scope: dict[str, object] = {}
    output, seen = "", []
    for kind, text in BLOCK.findall(GUIDE.read_text("utf-8")):
        seen.append(kind)
        named = re.match(r"# file: (\S+)\n", text)
        if named:
            Path(named[1]).write_text(text.removeprefix(named[0]))
        elif kind == "python":
            exec(compile(text, "guide", "exec"), scope)
        elif kind == "sh":
            for line in text.splitlines():
                command, _, code = line.partition("# exit ")
                verb, *words = shlex.split(command)
                assert verb == "fedlora"
                done = fedlora(monkeypatch, capsys, *words)
                assert done.code == int(code or 0), done
                output = plain(done.out)
        else:
            assert kind == "text"
            for line in text.splitlines():
                assert plain(line) in output, line
    assert len(seen) >= 15


@pytest.mark.parametrize(
    "path", re.findall(r"`((?:strategies|tests)/[\w/]+\.py)`", GUIDE.read_text())
)
def test_every_file_the_guide_names_exists(path):
    assert (GUIDE.parents[1] / path).is_file()


def test_the_guide_names_every_field_that_it_explains():
    """Of the table: attributes that the classes have."""
    from fedlora.messages import ClientUpdate, RoundPlan, Start
    from fedlora.strategies.base import Stats, StrategyState

    rows = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", GUIDE.read_text(), re.MULTILINE))
    for kind in (StrategyState, RoundPlan, Start, ClientUpdate, Stats):
        for name in re.findall(r"`(\w+)`", rows.pop(kind.__name__)):
            assert name in kind.__annotations__ or hasattr(kind, name) or name == "reduce"
    assert rows == {}
