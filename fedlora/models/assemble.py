"""The model an adapter belongs to, with the adapter in it."""

from dataclasses import dataclass
from pathlib import Path

from fedlora.adapters.files import AdapterFolder, load_adapter
from fedlora.adapters.inject import AdaptedModel
from fedlora.config.job import ModelSection
from fedlora.errors import AdapterError
from fedlora.models.loading import BaseModel, Processor, load_base, load_processor


@dataclass(frozen=True)
class Assembled:
    """An adapter on its base."""

    adapter: AdapterFolder
    section: ModelSection
    processor: Processor
    base: BaseModel
    adapted: AdaptedModel


def find_adapter(path: Path) -> Path:
    """The adapter folder that `path` (a run folder or an adapter folder) means.

    Raises:
        AdapterError: neither, a run that has not ended, or one without a global adapter.
    """
    if (path / "adapter_config.json").is_file():
        return path
    if (path / "HEAD").is_file() and (path / "personal").is_dir():
        names = sorted(folder.name for folder in (path / "personal").iterdir())
        raise AdapterError(
            f"run {path} has no global adapter, for its strategy leaves a part with each of its "
            f"{len(names)} clients; give one client's, e.g. {path / 'personal' / names[0]}"
        )
    if (path / "adapter" / "adapter_config.json").is_file():
        return path / "adapter"
    if (path / "HEAD").is_file():
        raise AdapterError(f"run {path} has not ended; finish it with: fedlora resume {path}")
    raise AdapterError(f"{path} is neither an adapter folder nor a run folder")


def assemble(path: Path, model: str | None = None, device: str = "cpu") -> Assembled:
    """Loads the base of the adapter in `path` and puts the adapter into it.

    Args:
        path: run folder or adapter folder.
        model: base model to use instead of the recorded one; it must have its fingerprint.

    Raises:
        AdapterError, ModelError: missing, corrupt, or of another base.
    """
    folder = load_adapter(find_adapter(path))
    section = ModelSection.model_validate(
        {
            "name": model or folder.base_model,
            "task": folder.task,
            "dtype": folder.dtype,
            "revision": None if model else folder.revision,
        }
    )
    processor = load_processor(section)
    base = load_base(
        section,
        labels=folder.labels,
        pad_id=processor.pad_id,
        seed=folder.spec.seed,
        heads=folder.spec.heads,
        device=device,
    )
    adapted = AdaptedModel.from_spec(
        base.model, folder.spec, base.fingerprint, folder.basis or None
    )
    adapted.load(folder.tensors)
    return Assembled(folder, section, processor, base, adapted)
