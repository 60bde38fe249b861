"""Second moments of the inputs of every adapted layer, which RegMean weighs adapters by."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedlora.adapters.inject import AdaptedModel
from fedlora.config.job import ModelSection
from fedlora.data.encoder import text_of
from fedlora.data.example import Example, collate
from fedlora.data.files import read_file
from fedlora.errors import ConfigError, DataError
from fedlora.merging.sources import Source
from fedlora.models.export import PEFT_TASKS
from fedlora.models.loading import load_base, load_processor

_BATCH = 8


def collect_grams(
    source: Source, model: str | None, file: Path, max_length: int
) -> dict[str, Tensor]:
    """Layer -> mean of x x^T (k, k), float64, over the tokens that reach the layer.

    The inputs are those of the base with this adapter in it. Holds k^2 numbers per layer.

    Args:
        source: the adapter.
        model: its base; None takes the recorded one.
        file: a data file with a column "text".
        max_length: texts are cut to so many tokens.

    Raises:
        ConfigError: no base is known, or the task is not one on texts.
        DataError: the file cannot be read or has no text.
        ModelError, AdapterError: the base cannot be loaded, or is another.
    """
    # PEFT does not ask for a task; layers that the language model lacks are refused below
    wanted = source.task_type or PEFT_TASKS["causal-lm"]
    task = next((ours for ours, peft in PEFT_TASKS.items() if peft == wanted), None)
    name = model or source.base_model
    if not name:
        raise ConfigError(f"{source.name} does not say its base model; give --model")
    if task is None:
        raise ConfigError(
            f"{source.name} is for task {wanted}; inputs can be collected for "
            f"{', '.join(PEFT_TASKS.values())}"
        )
    section = ModelSection.model_validate({"name": name, "task": task})
    processor = load_processor(section)
    base = load_base(
        section,
        labels=_labels(source),
        pad_id=processor.pad_id,
        seed=source.spec.seed,
        heads=source.spec.heads,
    )
    fingerprint = base.fingerprint if source.spec.base_fingerprint else ""
    adapted = AdaptedModel.from_spec(base.model, source.spec, fingerprint, source.basis or None)
    adapted.load(source.tensors)
    positions = getattr(base.model.config, "max_position_embeddings", None) or max_length
    texts = _token_ids(processor.tokenizer, file, min(max_length, positions))
    return _second_moments(adapted, texts, processor.pad_id)


def _token_ids(tokenizer: Any, file: Path, max_length: int) -> list[Tensor]:
    table = read_file(file)
    if "text" not in table.columns:
        raise DataError(
            f'{file} has no column "text" (columns: {table.column_list}); RegMean reads its '
            "texts from there"
        )
    texts = [text for row in table.rows if (text := text_of(row, "text")).strip()]
    ids = tokenizer(texts, truncation=True, max_length=max_length)["input_ids"] if texts else []
    found = [torch.tensor(row, dtype=torch.int64) for row in ids if row]
    if not found:
        raise DataError(f'{file} has no text in column "text"; expected at least one')
    return sorted(found, key=len)


def _second_moments(adapted: AdaptedModel, texts: list[Tensor], pad_id: int) -> dict[str, Tensor]:
    sums = {
        layer.name: torch.zeros(layer.inp, layer.inp, dtype=torch.float64)
        for layer in adapted.spec.layers
    }
    counts = dict.fromkeys(sums, 0)
    mask = torch.zeros(0)

    def recorder(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def record(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            x: Tensor = inputs[0].detach()
            # a pooled input has no token axis; padding would count as tokens
            rows = x[mask] if x.shape[:-1] == mask.shape else x.flatten(0, -2)
            rows = rows.double()  # (tokens, k)
            sums[name] += rows.T @ rows
            counts[name] += rows.shape[0]

        return record

    hooks = [
        layer.register_forward_pre_hook(recorder(name)) for name, layer in adapted.layers.items()
    ]
    adapted.model.eval()
    with torch.no_grad():
        for start in range(0, len(texts), _BATCH):
            examples = [Example({"input_ids": ids}, ids) for ids in texts[start : start + _BATCH]]
            batch = collate(examples, pad_id)
            mask = batch.inputs["attention_mask"].bool()
            adapted.model(**batch.inputs)
    for hook in hooks:
        hook.remove()
    if unused := [name for name, count in counts.items() if not count]:
        raise DataError(f"no input reached layer {unused[0]}; RegMean needs inputs of every layer")
    return {name: total / counts[name] for name, total in sums.items()}


def _labels(source: Source) -> tuple[str, ...]:
    """The classes, or as many names as a head of PEFT has outputs."""
    if source.labels or source.task_type != PEFT_TASKS["sequence-classification"]:
        return source.labels
    outputs = [tensor.shape[0] for tensor in source.heads.values()]
    return tuple(map(str, range(min(outputs, default=2))))
