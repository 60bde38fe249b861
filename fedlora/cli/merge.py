"""`fedlora merge`"""

import json
import tomllib
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import typer

from fedlora.errors import ConfigError


def run_merge(
    adapters: Sequence[Path],
    strategy: str,
    *,
    rank: int | None,
    weights: str | None,
    options: Sequence[str],
    model: str | None,
    data: Sequence[Path],
    seed: int,
    out: Path,
    as_json: bool,
) -> None:
    """Merges adapter folders into one in PEFT format.

    Raises:
        ConfigError: settings that are wrong, or do not go together.
        AdapterError: adapters that cannot be read or do not match.
    """
    from fedlora.merging.folder import write_merged
    from fedlora.merging.grams import collect_grams
    from fedlora.merging.merge import Recipe, merge_sources, normalise
    from fedlora.merging.options import make_merger
    from fedlora.merging.regmean import RegMean
    from fedlora.merging.sources import check_match, read_source

    merger = make_merger(strategy, dict(_option(text) for text in options))
    shares = normalise(_numbers(weights), len(adapters))
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"--out {out} exists and is not empty; choose another folder")
    if data and not merger.needs_data:
        raise ConfigError(f"--data has no effect with --strategy {strategy}; leave it out")
    if merger.needs_data and len(data) not in (1, len(adapters)):
        raise ConfigError(
            f"--strategy {strategy} needs texts, one --data FILE for all {len(adapters)} adapters "
            f"or one for each; found {len(data)}"
        )
    sources = [read_source(path) for path in adapters]
    check_match(sources, model)
    grams = []
    if isinstance(merger, RegMean):
        files = list(data) * len(sources) if len(data) == 1 else data
        grams = [
            collect_grams(source, model, file, merger.max_length)
            for source, file in zip(sources, files, strict=True)
        ]
    recipe = Recipe(strategy, merger, shares, rank, seed)
    merged = merge_sources(sources, recipe, grams)
    base_model = model or next((s.base_model for s in sources if s.base_model), "")
    write_merged(out, merged, sources, recipe, base_model)
    ranks = {layer.name: layer.rank for layer in merged.spec.layers}
    if as_json:
        found: dict[str, Any] = {
            "out": str(out),
            "strategy": strategy,
            "options": asdict(merger),
            "adapters": [source.name for source in sources],
            "weights": list(shares),
            "seed": seed,
            "base_model": base_model,
            "ranks": ranks,
            "heads": list(merged.spec.heads),
            "distance_from_mean": merged.distance_from_mean,
        }
        typer.echo(json.dumps(found))
        return
    rank_text = ", ".join(map(str, sorted(set(ranks.values()))))
    distance = merged.distance_from_mean
    typer.echo(f"wrote {out}: {len(sources)} adapters merged by {strategy}, rank {rank_text}")
    if distance is not None:
        typer.echo(f"distance from the weighted mean of the changes: {distance:.3g} of its norm")
    typer.echo(f"load it with peft.PeftModel.from_pretrained(base, {str(out)!r})")


def _option(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"option {text!r} is not of the form key=value")
    try:
        return key.strip(), tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return key.strip(), value.strip()


def _numbers(text: str | None) -> list[float] | None:
    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"--weights {text!r} is not a list of numbers such as 2,1,1") from None
