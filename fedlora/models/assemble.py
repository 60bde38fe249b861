"""The model an adapter belongs to, with the adapter in it."""

from dataclasses import dataclass
from pathlib import Path

from fedlora.adapters.files import AdapterFolder, load_adapter
from fedlora.adapters.inject import AdaptedModel
from fedlora.config.job import ModelSection
from fedlora.errors import AdapterError, near_miss
from fedlora.models.loading import BaseModel, Processor, load_base, load_processor

# folder of a run in which clients have adapters of their own, by name
PERSONAL = "personal"


@dataclass(frozen=True)
class Assembled:
    """An adapter on its base."""

    adapter: AdapterFolder
    section: ModelSection
    processor: Processor
    base: BaseModel
    adapted: AdaptedModel


def find_adapter(path: Path, client: str | None = None) -> Path:
    """The adapter folder that `path` (a run folder or an adapter folder) means.

    Args:
        client: of a run whose clients have adapters of their own, the one that is meant.

    Raises:
        AdapterError: neither, a run that has not ended, or a client that is missing, unknown
            or without an adapter of its own.
    """
    run = path.parent if path.name == "adapter" and (path.parent / "HEAD").is_file() else path
    ended = (run / "adapter" / "adapter_config.json").is_file()
    if ended and (run / PERSONAL).is_dir():
        known = sorted(folder.name for folder in (run / PERSONAL).iterdir() if folder.is_dir())
        if client is None:
            raise AdapterError(
                f"run {run} has no global model: its strategy leaves a part of the adapter with "
                f"each client; give --client NAME, or the folder {run / PERSONAL}/NAME; clients: "
                f"{', '.join(known[:20])}{', ...' if len(known) > 20 else ''}"
            )
        if client not in known:
            raise AdapterError(
                f"run {run} has no client {client!r}{near_miss(client, known)}; clients: "
                f"{', '.join(known[:20])}{', ...' if len(known) > 20 else ''}"
            )
        return run / PERSONAL / client
    if client is not None and (ended or (path / "adapter_config.json").is_file()):
        raise AdapterError(
            f"--client {client} was given, but {path} holds one adapter for all clients; leave "
            "--client out"
        )
    if (path / "adapter_config.json").is_file():
        return path
    if ended:
        return path / "adapter"
    if (path / "HEAD").is_file():
        raise AdapterError(f"run {path} has not ended; finish it with: fedlora resume {path}")
    raise AdapterError(f"{path} is neither an adapter folder nor a run folder")


def run_of(path: Path) -> Path:
    """The run folder that an adapter folder in it belongs to, or `path` itself."""
    if path.name == "adapter":
        return path.parent
    return path.parent.parent if path.parent.name == PERSONAL else path


def assemble(
    path: Path, model: str | None = None, device: str = "cpu", client: str | None = None
) -> Assembled:
    """Loads the base of the adapter in `path` and puts the adapter into it.

    Args:
        path: run folder or adapter folder.
        model: base model to use instead of the recorded one; it must have its fingerprint.
        client: see `find_adapter`.

    Raises:
        AdapterError, ModelError: missing, corrupt, or of another base.
    """
    folder = load_adapter(find_adapter(path, client))
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
