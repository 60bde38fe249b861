"""Adapter folders in fedlora's own format, which holds every method.

adapter_config.json         spec, base model, task, labels
adapter_model.safetensors   factors and heads by full name
basis.safetensors           frozen tensors derived from the base, if the method has any
README.md                   a card for people
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedlora.adapter import AdapterSpec, Tensors, trained_shapes
from fedlora.adapters import METHODS
from fedlora.errors import AdapterError
from fedlora.storage import storage_errors, write_atomic
from fedlora.wire import decode_tensors, encode_tensors

FORMAT = "fedlora-adapter/1"


@dataclass(frozen=True)
class AdapterFolder:
    """What an adapter folder holds.

    Attributes:
        spec: the adapter.
        tensors: factors and heads.
        basis: frozen tensors derived from the base; empty when the method has none.
        base_model: `model.name` of the job that made it.
        task: the model's task.
        labels: class names of a classification task.
        revision: revision of a hub model.
        dtype: number format of the base.
    """

    spec: AdapterSpec
    tensors: Tensors
    basis: Tensors
    base_model: str
    task: str
    labels: tuple[str, ...]
    revision: str | None = None
    dtype: str = "float32"


def save_adapter(folder: Path, adapter: AdapterFolder, card: str) -> None:
    """Writes the folder; each file appears whole.

    Raises:
        StorageError: the disk refused.
    """
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "adapter_model.safetensors", encode_tensors(adapter.tensors))
    if adapter.basis:
        write_atomic(folder / "basis.safetensors", encode_tensors(adapter.basis))
    config = {
        "format": FORMAT,
        "base_model": adapter.base_model,
        "revision": adapter.revision,
        "dtype": adapter.dtype,
        "task": adapter.task,
        "labels": list(adapter.labels),
        "spec": adapter.spec.to_json(),
    }
    write_atomic(folder / "README.md", card.encode())
    text = json.dumps(config, indent=1, sort_keys=True)
    write_atomic(folder / "adapter_config.json", text.encode())


def load_adapter(folder: Path) -> AdapterFolder:
    """The adapter in a folder that `save_adapter` wrote.

    Raises:
        AdapterError: missing, foreign or corrupt.
    """
    config = _config(folder)
    if config.get("format") != FORMAT:
        raise AdapterError(
            f"{folder} is not a fedlora adapter (format {config.get('format')!r}; expected "
            f"{FORMAT!r}); give the adapter folder of a run"
        )
    try:
        spec = AdapterSpec.from_json(config["spec"])
        if spec.method not in METHODS:
            raise AdapterError(f"{folder}: adapter method {spec.method!r} is not known")
        method = METHODS[spec.method]
        shapes = trained_shapes(spec, method)
        tensors = _tensors(folder / "adapter_model.safetensors", shapes)
        basis: Tensors = {}
        if method.basis_provenance == "derived":
            basis = _tensors(folder / "basis.safetensors", method.basis_shapes(spec.layers))
        return AdapterFolder(
            spec=spec,
            tensors=tensors,
            basis=basis,
            base_model=str(config["base_model"]),
            task=str(config["task"]),
            labels=tuple(config["labels"]),
            revision=config["revision"],
            dtype=str(config["dtype"]),
        )
    except (KeyError, TypeError) as e:
        raise AdapterError(f"{folder}/adapter_config.json is not readable: {e}") from e


def _config(folder: Path) -> Mapping[str, Any]:
    path = folder / "adapter_config.json"
    try:
        value = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise AdapterError(f"{folder} holds no adapter_config.json, so no adapter") from None
    except (OSError, ValueError) as e:
        raise AdapterError(f"{path} cannot be read: {e}") from e
    if not isinstance(value, dict):
        raise AdapterError(f"{path} is not a JSON object")
    return value


def _tensors(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> Tensors:
    try:
        return decode_tensors(path.read_bytes(), shapes)
    except OSError as e:
        raise AdapterError(f"{path} cannot be read: {e.strerror}") from e
    except AdapterError as e:
        raise AdapterError(f"{path} does not hold the tensors of its spec: {e}") from e
