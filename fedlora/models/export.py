"""Exports that need the base model: a merged model, and an adapter beside its base."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from fedlora.adapters.export import export_peft
from fedlora.errors import StorageError
from fedlora.models.assemble import Assembled
from fedlora.models.loading import load_base, quiet
from fedlora.storage import storage_errors

PEFT_TASKS = {"causal-lm": "CAUSAL_LM", "sequence-classification": "SEQ_CLS"}


def export_merged(assembled: Assembled, folder: Path) -> None:
    """The base model with the adapter in its weights, float32, loadable by Auto classes.

    Raises:
        StorageError: the disk refused.
    """
    # the sum is formed in float32, so that a bf16 base does not round the change away
    assembled.base.model.float()
    with assembled.adapted.merged(), quiet(), _write_errors(folder):
        model = assembled.adapted.detach()
        model.save_pretrained(folder, safe_serialization=True)  # type: ignore[operator]
    _save_processor(assembled, folder)


def export_base(assembled: Assembled, folder: Path) -> None:
    """The plain base model with its tokenizer, for people who do not have it.

    Raises:
        StorageError: the disk refused.
    """
    plain = load_base(
        assembled.section,
        labels=assembled.adapter.labels,
        pad_id=assembled.processor.pad_id,
        seed=assembled.adapter.spec.seed,
        heads=assembled.adapter.spec.heads,
    )
    with quiet(), _write_errors(folder):
        plain.model.save_pretrained(folder, safe_serialization=True)  # type: ignore[operator]
    _save_processor(assembled, folder)


def export_to_peft(assembled: Assembled, folder: Path, base_name: str) -> None:
    """The adapter as peft reads it.

    Raises:
        AdapterError: the method has no form in peft and is not of low rank.
        StorageError: the disk refused.
    """
    adapter = assembled.adapter
    export_peft(
        adapter.spec,
        adapter.tensors,
        assembled.adapted.basis,
        folder,
        base_model_name=base_name,
        task_type=PEFT_TASKS.get(adapter.task),
        conv1d=any(layer.transposed for layer in assembled.adapted.layers.values()),
    )


@contextmanager
def _write_errors(folder: Path) -> Iterator[None]:
    try:
        with storage_errors(folder):
            yield
    except SafetensorError as e:
        raise StorageError(f"{folder} cannot be written: {e}; free some space") from e


def _save_processor(assembled: Assembled, folder: Path) -> None:
    processor = assembled.processor.tokenizer or assembled.processor.image_processor
    with storage_errors(folder):
        processor.save_pretrained(folder)  # type: ignore[union-attr]
