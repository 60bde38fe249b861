"""`fedlora compare`"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import typer
from rich.console import Console

from fedlora.cli.simulate import read_job
from fedlora.errors import EXIT_INTERRUPTED, ConfigError, RunFolderError, near_miss
from fedlora.report.comparison_page import write_comparison
from fedlora.simulation.comparison import compare
from fedlora.storage import file_above
from fedlora.strategies.plugin import find_strategy

BASELINES = ("local", "centralised")


def run_compare(
    path: Path,
    out: Path,
    strategies: str,
    baselines: str,
    seeds: int,
    overrides: Sequence[str],
    *,
    as_json: bool,
) -> None:
    """Runs, or continues, a comparison.

    Raises:
        ConfigError: unknown strategies or baselines.
        RunFolderError: `out` holds something else, or lies below a file.
    """
    job = read_job(path, overrides)
    names = _split(strategies)
    wanted = _split(baselines)
    problems = []
    for name in wanted:
        if name not in BASELINES:
            problems.append(
                f"--baselines: {name!r} is not known{near_miss(name, BASELINES)}; "
                f"known: {', '.join(BASELINES)}"
            )
    for name in names:
        try:
            find_strategy(name)
        except ConfigError as e:
            problems += e.problems
    if not names and not wanted:
        problems.append("nothing to compare; give --strategies or --baselines")
    if problems:
        raise ConfigError(*problems)
    if above := file_above(out):
        raise RunFolderError(f"--out {out}: {above} is a file; choose another folder")
    ours = (out / "runs").is_dir() or (out / "baselines").is_dir()
    if (
        out.is_file()
        or (out / "HEAD").exists()
        or (out.exists() and any(out.iterdir()) and not ours)
    ):
        raise RunFolderError(f"--out {out} holds something else; choose another folder")
    console = Console(stderr=as_json)
    try:
        found = compare(
            job,
            out,
            strategies=names,
            baselines=wanted,
            num_seeds=seeds,
            announce=lambda text: console.print(text, highlight=False, markup=False),
        )
    except KeyboardInterrupt:
        print("interrupted; give the same command again to go on", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
    page = write_comparison(out)
    if as_json:
        typer.echo(json.dumps(found))
        return
    console.print(
        (out / "table.md").read_text("utf-8"), highlight=False, markup=False, soft_wrap=True
    )
    console.print(f"report   {page}", highlight=False, markup=False, soft_wrap=True)


def _split(text: str) -> list[str]:
    return list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
