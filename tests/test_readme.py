"""What the README shows is true of the program."""

import re
import tomllib
from pathlib import Path

import click
import pytest
import typer

from fedlora.adapters import METHODS
from fedlora.cli.main import app
from fedlora.config.load import parse_job
from fedlora.strategies import STRATEGIES

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_job_in_the_readme_is_valid():
    block = re.search(r"```toml\n(.*?)```", README, re.DOTALL)
    assert block is not None
    parse_job(tomllib.loads(block.group(1)))
    for name in (*METHODS, *STRATEGIES):
        assert name in block.group(1)


@pytest.mark.parametrize("example", sorted((ROOT / "examples").glob("*/job.toml")))
def test_every_example_job_is_valid(example):
    parse_job(tomllib.loads(example.read_text()))


def test_every_command_in_the_readme_exists_with_its_options():
    group = typer.main.get_command(app)
    assert isinstance(group, click.Group)
    text = README.replace("\\\n", " ")
    lines = re.findall(r"^fedlora (.*?)(?:#.*)?$", text, re.MULTILINE)
    assert len(lines) >= 6
    for line in lines:
        verb, *words = line.split()
        command = group.commands[verb]
        while isinstance(command, click.Group):
            command = command.commands[words.pop(0)]
        known = {name for param in command.params for name in param.opts}
        for word in words:
            if word.startswith("-"):
                assert word in known, f"{verb} {word}"


def test_every_make_target_in_the_readme_exists():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w[\w-]*)", README, re.MULTILINE):
        assert f"\n{target}:" in makefile
