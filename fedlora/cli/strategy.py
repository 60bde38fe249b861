"""`fedlora strategy list`, `new` and `check`"""

import contextlib
import inspect
import json as jsonlib
import re
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedlora.errors import EXIT_USAGE, ConfigError, StorageError

if TYPE_CHECKING:
    from fedlora.strategies.conformance import Finding
    from fedlora.strategies.conformance.federation import Maker

app = typer.Typer(
    help="List, start and check aggregation strategies.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
FLAGS = ("exact", "linear", "hetero_rank", "personal", "asynchronous")
HEADINGS = ("name", "exact", "linear", "hetero", "personal", "async", "needs", "privacy", "what")
ORDER = ("kept", "waived", "broken")


@app.command("list")
def list_all(json: AsJson = False) -> None:
    """Show every strategy and wrapper, and what each can do.

    Example: fedlora strategy list
    """
    from fedlora.strategies import STRATEGIES
    from fedlora.strategies.wrappers import WRAPPERS

    found = {
        "strategies": [_described(name, kind) for name, kind in STRATEGIES.items()],
        "wrappers": [_described(name, kind) for name, kind in WRAPPERS.items()],
    }
    if json:
        typer.echo(jsonlib.dumps(found))
        return
    for title, rows in found.items():
        if rows:
            typer.echo(f"{title}\n{_table(rows)}\n")
    typer.echo("A wrapper's columns say what it leaves of the strategy inside it.\n")
    typer.echo("options: in [federation.strategy_options], or in the wrapper's own table")
    for row in (*found["strategies"], *found["wrappers"]):
        if row["options"]:
            values = ", ".join(f"{k} = {jsonlib.dumps(v)}" for k, v in row["options"].items())
            typer.echo(f"{row['name']:<17}  {values}")


@app.command()
def new(path: Annotated[Path, typer.Argument(help="The file to write, e.g. mine.py.")]) -> None:
    """Write a small strategy that runs as it is, to build your own on.

    Example: fedlora strategy new mine.py
    """
    from fedlora.strategies import skeleton

    if path.suffix != ".py":
        raise ConfigError(f"{path} is no name for a Python file; expected one that ends in .py")
    name = re.sub(r"[^a-z0-9]+", "-", path.stem.lower()).strip("-") or "my-strategy"
    text = inspect.getsource(skeleton).replace('"my-strategy"', f'"{name}"')
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise ConfigError(f"{path} exists and is not overwritten; choose another name") from None
    except OSError as e:
        raise StorageError(f"{path} cannot be written: {e}") from e
    typer.echo(f"wrote {path}; next: fedlora strategy check {path}:MyStrategy")


@app.command()
def check(
    name: Annotated[str, typer.Argument(help="FILE.py:Class, or a name from the list.")],
    json: AsJson = False,
) -> None:
    """Try a strategy against the laws that every run relies on, and explain what fails.

    Example: fedlora strategy check mine.py:MyStrategy
    """
    from fedlora.adapters import METHODS
    from fedlora.strategies.conformance import Federation, admit, federations, findings

    make = _maker(name)
    # what a plug-in prints is not part of the result
    with contextlib.redirect_stdout(sys.stderr):
        tried = federations(make, METHODS)
        if not tried:
            # refused by every method: the reason for the plainest one says why
            admit(Federation(make, METHODS, "lora"), make(METHODS["lora"]))
        found = [finding for federation in tried for finding in findings(federation)]
    worst = _worst(found)
    broken = sum(finding.verdict == "broken" for finding in worst)
    methods = list(dict.fromkeys(federation.method.name for federation in tried))
    if json:
        report = {
            "strategy": name,
            "passed": not broken,
            "methods": methods,
            "laws": [_plain(finding) for finding in worst],
        }
        typer.echo(jsonlib.dumps(report))
    else:
        _print(name, make, methods, worst)
    if broken:
        raise typer.Exit(EXIT_USAGE)


def _maker(name: str) -> "Maker":
    """Makes the named strategy; a wrapper is tried around fedit."""
    from fedlora.strategies.fedit import FedIT
    from fedlora.strategies.plugin import find_strategy
    from fedlora.strategies.wrappers import WRAPPERS, Wrapper

    kind = WRAPPERS[name] if name in WRAPPERS else find_strategy(name)
    if issubclass(kind, Wrapper):
        wrapper = kind
        return lambda traits: wrapper(FedIT(traits))
    strategy = kind
    return lambda traits: strategy(traits)


def _worst(found: Iterable["Finding"]) -> list["Finding"]:
    """One finding per law: the first of its worst verdict."""
    worst: dict[str, Finding] = {}
    for finding in found:
        old = worst.setdefault(finding.law.name, finding)
        if ORDER.index(finding.verdict) > ORDER.index(old.verdict):
            worst[finding.law.name] = finding
    return list(worst.values())


def _plain(finding: "Finding") -> dict[str, Any]:
    law = finding.law
    value: dict[str, Any] = {"law": law.name, "meaning": law.meaning, "verdict": finding.verdict}
    if finding.verdict != "kept":
        value |= {
            "method": finding.method,
            "ranks": list(finding.ranks),
            "found": finding.found,
            "expected": finding.expected,
            "cause": law.cause,
            "look": law.look,
        }
    return value


def _print(name: str, make: "Maker", methods: Sequence[str], worst: Sequence["Finding"]) -> None:
    from fedlora.adapters import METHODS

    by = {verdict: [f for f in worst if f.verdict == verdict] for verdict in ORDER}
    typer.echo(f"{name} with {', '.join(methods)}")
    kept = ", ".join(f.law.name for f in by["kept"]) or "none"
    typer.echo(textwrap.fill(f"kept    {kept}", 96, subsequent_indent=" " * 8))
    for finding in by["waived"]:
        reason = make(METHODS[finding.method]).waives[finding.law.name]
        typer.echo(f"waived  {finding.law.name}: {reason}")
    for finding in by["broken"]:
        law, ranks = finding.law, ", ".join(map(str, finding.ranks))
        typer.echo(f"\nBROKEN  {law.name} (method {finding.method}, ranks {ranks})")
        for title, text in (
            ("law", law.meaning),
            ("found", finding.found),
            ("expected", finding.expected),
            ("usually", law.cause),
            ("look at", law.look),
        ):
            lines = " ".join(text.split())
            typer.echo(
                textwrap.fill(
                    f"  {title:<9} {lines}", 96, subsequent_indent=" " * 12, break_long_words=False
                )
            )
    broken = len(by["broken"])
    gated = any(f.law.gate for f in by["broken"])
    rest = "; mend this first, the other laws were not tried" if gated else ""
    text = f"{broken} of {len(worst)} laws broken{rest}" if broken else "all laws kept or waived"
    typer.echo(f"\n{text}")


def _described(name: str, kind: type[Any]) -> dict[str, Any]:
    what = (inspect.getdoc(kind) or "").split("\n", maxsplit=1)[0]
    return {
        "name": name,
        **{flag: bool(getattr(kind, flag)) for flag in FLAGS},
        "needs": kind.needs,
        "options": dict(kind.options),
        "privacy": sorted(kind.privacy),
        "what": what,
    }


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = [list(HEADINGS)]
    for row in rows:
        flags = ["yes" if row[flag] else "-" for flag in FLAGS]
        privacy = ", ".join(row["privacy"]) or "-"
        lines.append([row["name"], *flags, row["needs"], privacy, row["what"]])
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEADINGS) - 1)]
    return "\n".join(
        "  ".join([*(cell.ljust(w) for cell, w in zip(line, widths, strict=False)), line[-1]])
        for line in lines
    )
