"""Loaded: a job's base model, data and fresh adapter, in memory."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from fedlora.adapter import AdapterState
from fedlora.adapters import METHODS
from fedlora.adapters.files import load_adapter
from fedlora.adapters.inject import AdaptedModel, adapt
from fedlora.adapters.targets import find_targets
from fedlora.config.job import AdapterSection, DataSection, Job, PartitionSection
from fedlora.data.federated import FederatedData, load_federated
from fedlora.errors import ConfigError
from fedlora.models.loading import BaseModel, Processor, load_base, load_processor
from fedlora.strategies.plugin import make_strategy


class ReadData(Protocol):
    """Reads the data that this machine needs; `load_federated` is one."""

    def __call__(
        self,
        data: DataSection,
        partition: PartitionSection,
        task: str,
        *,
        tokenizer: Any = None,
        image_processor: Any = None,
        seed: int,
    ) -> FederatedData: ...


@dataclass(frozen=True)
class Loaded:
    """What several runs of one comparison share: base model, adapter slots and data."""

    processor: Processor
    data: FederatedData
    base: BaseModel
    adapted: AdaptedModel
    initial: AdapterState


def load(job: Job, read: ReadData = load_federated) -> Loaded:
    """Loads model and data and attaches a fresh adapter, for whoever merges updates.

    Args:
        job: the run's job.
        read: which data are read; by default those of all clients.

    Raises:
        ConfigError, DataError, ModelError, AdapterError: bad input, all with exit code 2.
    """
    # before minutes of loading
    make_strategy(job.federation, METHODS[job.adapter.method]).check_method()
    return load_for_client(job, read)


def load_for_client(job: Job, read: ReadData) -> Loaded:
    """The same for who only trains: the job's strategy, which may be a plug-in, is not imported.

    Raises:
        ConfigError, DataError, ModelError, AdapterError: see `load`.
    """
    _check_device(job.run.device)
    _check_bf16(job)
    torch.set_num_threads(job.run.threads)
    processor = load_processor(job.model)
    data = read(
        job.data,
        job.partition,
        job.model.task,
        tokenizer=processor.tokenizer,
        image_processor=processor.image_processor,
        seed=job.run.seed,
    )
    base = load_base(
        job.model,
        labels=data.labels,
        pad_id=processor.pad_id,
        seed=job.run.seed,
        heads=None if job.adapter.heads == "auto" else job.adapter.heads,
        device=job.run.device,
    )
    _check_length(job, base)
    section = job.adapter
    if section.start is not None:
        adapted = _continued(base, section, data.labels)
    else:
        adapted = adapt(
            base.model,
            method=section.method,
            rank=section.rank,
            alpha=section.alpha,
            targets=section.targets,
            heads=base.heads,
            base_fingerprint=base.fingerprint,
            seed=job.run.seed,
            dropout=section.dropout,
            options=section.options,
        )
    return Loaded(processor, data, base, adapted, adapted.state())


def _check_device(device: str) -> None:
    try:
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as e:
        reason = str(e).splitlines()[0]
        raise ConfigError(
            f"run.device = {device!r} cannot be used here: {reason}; choose cpu, or a cuda device "
            "that torch finds"
        ) from e


def _check_bf16(job: Job) -> None:
    asked = {
        'training.precision = "bf16"': job.training.precision == "bf16",
        'model.dtype = "bfloat16"': job.model.dtype == "bfloat16",
    }
    on_gpu = torch.device(job.run.device).type == "cuda"
    if on_gpu and any(asked.values()) and not torch.cuda.is_bf16_supported(False):
        raise ConfigError(
            f"{' and '.join(name for name, is_asked in asked.items() if is_asked)}: the GPU "
            f"{job.run.device!r} has no bfloat16; choose float32, or another device"
        )


def _check_length(job: Job, base: BaseModel) -> None:
    config = base.model.config
    for name in ("max_position_embeddings", "n_positions"):
        longest = getattr(config, name, None)
        if isinstance(longest, int) and job.data.max_length > longest:
            raise ConfigError(
                f"data.max_length = {job.data.max_length} is more than the {longest} positions of "
                f"the model; choose at most {longest}"
            )


def _continued(base: BaseModel, section: AdapterSection, labels: tuple[str, ...]) -> AdaptedModel:
    assert section.start is not None
    folder = Path(section.start)
    start = load_adapter(folder)
    spec = start.spec
    asked = (section.method, section.rank, section.alpha or spec.alpha)
    if asked != (spec.method, spec.rank, spec.alpha):
        raise ConfigError(
            f"adapter.start = {str(folder)!r} holds a {spec.method} adapter of rank {spec.rank} "
            f"and alpha {spec.alpha:g}, the job asks for {asked[0]}, {asked[1]} and {asked[2]:g}; "
            f'set adapter.method = "{spec.method}", adapter.rank = {spec.rank} and '
            f"adapter.alpha = {spec.alpha:g}"
        )
    if start.labels != labels:
        raise ConfigError(
            f"adapter.start = {str(folder)!r} was trained on the classes "
            f"{', '.join(start.labels)}, the data have {', '.join(labels)}; the head needs the "
            "same classes in the same order (data.labels)"
        )
    if spec.heads != base.heads:
        raise ConfigError(
            f"adapter.start = {str(folder)!r} has the heads {list(spec.heads)}, this job trains "
            f"{list(base.heads)}; set adapter.heads to those of the adapter"
        )
    names = find_targets(base.model, section.targets, base.heads)
    if sorted(names) != [layer.name for layer in spec.layers]:
        raise ConfigError(
            f"adapter.start = {str(folder)!r} adapts {len(spec.layers)} layers, adapter.targets "
            f"matches {len(names)}; set adapter.targets to the layers of the adapter"
        )
    adapted = AdaptedModel.from_spec(
        base.model, start.spec, base.fingerprint, start.basis or None, section.dropout
    )
    adapted.load(start.tensors)
    return adapted
