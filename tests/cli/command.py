"""Runs the `fedlora` command in this process."""

import sys
from dataclasses import dataclass

import pytest

from fedlora.cli.main import run


@dataclass
class Done:
    """Exit code and what was printed."""

    code: int
    out: str
    err: str


def fedlora(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: object
) -> Done:
    """`fedlora WORDS...`"""
    monkeypatch.setattr(sys, "argv", ["fedlora", *map(str, words)])
    capsys.readouterr()
    code = 0
    try:
        run()
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else int(e.code is not None)
    captured = capsys.readouterr()
    return Done(code, captured.out, captured.err)
