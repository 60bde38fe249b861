"""`fedlora compare`"""

import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer
from rich.console import Console

from fedlora.cli.simulate import read_job
from fedlora.errors import EXIT_INTERRUPTED, ConfigError, RunFailed, RunFolderError
from fedlora.report.comparison import skew_text
from fedlora.report.comparison_page import write_comparison
from fedlora.simulation.comparison import Equal, compare
from fedlora.simulation.contenders import Contender, strategy_contender
from fedlora.storage import file_above


def run_compare(
    path: Path,
    out: Path,
    strategies: str | None,
    baselines: str,
    seeds: int,
    overrides: Sequence[str],
    *,
    variants: Sequence[str] = (),
    skew: str = "",
    equal: str = "rounds",
    as_json: bool,
) -> None:
    """Runs, or continues, a comparison.

    Args:
        strategies: names by comma; None is fedit, unless there are variants.
        variants: "label: key=value key=value", split as a shell would.
        skew: Dirichlet concentrations by comma.
        equal: "rounds" or "bytes".

    Raises:
        ConfigError: unknown strategies or baselines, variants that cannot be read.
        RunFolderError: `out` holds something else, or lies below a file.
        RunFailed: a contender failed; everything else is done and written.
    """
    job = read_job(path, overrides)
    if strategies is None:
        strategies = "" if variants else "fedit"
    contenders = [*map(strategy_contender, _split(strategies)), *map(_variant, variants)]
    if equal not in ("rounds", "bytes"):
        raise ConfigError(f"--equal {equal!r} is not known; known: rounds, bytes")
    at: Equal = "bytes" if equal == "bytes" else "rounds"
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
            contenders=contenders,
            baselines=_split(baselines),
            num_seeds=seeds,
            skews=_numbers(skew),
            equal=at,
            announce=lambda text: console.print(text, highlight=False, markup=False),
        )
        page = write_comparison(out)
    except KeyboardInterrupt:
        print("interrupted; give the same command again to go on", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
    if as_json:
        typer.echo(json.dumps(found))
    else:
        console.print(
            (out / "table.md").read_text("utf-8"), highlight=False, markup=False, soft_wrap=True
        )
        console.print(f"report   {page}", highlight=False, markup=False, soft_wrap=True)
    if failed := [run for run in found["runs"] if run["status"] == "failed"]:
        raise RunFailed("\n".join(map(_failure, failed)))


def _failure(run: dict[str, Any]) -> str:
    level = "" if run["skew"] is None else f", alpha {skew_text(run['skew'])}"
    return f"{run['label']}{level}, seed {run['seed']} failed: {run['reason']}"


def _variant(text: str) -> Contender:
    label, colon, rest = text.partition(":")
    try:
        words = shlex.split(rest)
    except ValueError as e:
        raise ConfigError(f"--variant {text!r} cannot be split into words: {e}") from e
    if not colon or not label.strip() or not words:
        raise ConfigError(
            f"--variant {text!r} is not of the form 'label: section.key=value ...', for example "
            "'slow: federation.strategy=fedit training.learning_rate=1e-4'"
        )
    return Contender(label.strip(), tuple(words))


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise ConfigError(
            f"--skew {text!r} is not a list of numbers; give Dirichlet concentrations by comma, "
            "for example 0.1,0.5,10"
        ) from None


def _split(text: str) -> list[str]:
    return list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
