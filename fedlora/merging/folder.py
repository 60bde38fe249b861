"""A merged adapter as a folder that PEFT loads, with a card that says what it is made of."""

import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from fedlora.adapters.export import export_peft
from fedlora.merging.merge import Merged, Recipe
from fedlora.merging.sources import Source
from fedlora.models.loading import BUILTIN
from fedlora.storage import storage_errors, write_atomic


def write_merged(
    folder: Path, merged: Merged, sources: Sequence[Source], recipe: Recipe, base_model: str
) -> None:
    """Writes the adapter and its card; a builtin base is put beside it.

    Args:
        base_model: name or path of the base.

    Raises:
        StorageError: the disk refused.
    """
    base_name = base_model
    if builtin := BUILTIN.get(base_model):
        with storage_errors(folder):
            shutil.copytree(builtin, folder / "base", ignore=shutil.ignore_patterns("__pycache__"))
        base_name = str((folder / "base").resolve())
    export_peft(
        merged.spec,
        merged.tensors,
        {},
        folder,
        base_model_name=base_name,
        task_type=next((s.task_type for s in sources if s.task_type), None),
        conv1d=any(source.conv1d for source in sources),
    )
    write_atomic(folder / "README.md", card(merged, sources, recipe, base_name).encode())


def card(merged: Merged, sources: Sequence[Source], recipe: Recipe, base: str) -> str:
    """What people should know of the merged adapter, in Markdown."""
    rows = "\n".join(
        f"| `{source.name}` | {source.spec.method} | {source.spec.rank} | {weight:.4g} |"
        for source, weight in zip(sources, recipe.weights, strict=True)
    )
    options = ", ".join(f"{key} = {value}" for key, value in asdict(recipe.merger).items())
    ranks = ", ".join(map(str, sorted({layer.rank for layer in merged.spec.layers})))
    asked = f"{recipe.rank} asked for" if recipe.rank else "none asked for"
    distance = merged.distance_from_mean
    return f"""# Merged adapter

A LoRA of scale 1 for `{base or "unknown base"}`, merged once out of {len(sources)} trained
adapters, without training.

| adapter | method | rank | weight |
| --- | --- | --- | --- |
{rows}

- strategy: `{recipe.strategy}` ({options or "no options"}), seed {recipe.seed}
- rank: {ranks} ({asked})
- layers: {len(merged.spec.layers)}; heads averaged: {", ".join(merged.spec.heads) or "none"}
- distance from the weighted mean of the changes: \
{"the mean is zero" if distance is None else f"{distance:.3g} of its norm"}
- privacy: whatever the adapters reveal of their training data, this one may reveal too.

Load it with `peft.PeftModel.from_pretrained(base, folder)`.
"""
