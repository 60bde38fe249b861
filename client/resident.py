"""Resident: the base model and the data of one client, in memory from call to call."""

import ctypes
import gc
import json
from pathlib import Path

import torch

from fedlora.config.job import Job
from fedlora.data.own import OwnData
from fedlora.models.loaded import Loaded, load_for_client


class Resident:
    """Holds what the last job needed, and loads anew only when a job needs something else.

    Args:
        read: reads the client's data.
        device: the site's own device, whatever the job says.
    """

    def __init__(self, read: OwnData, device: str) -> None:
        self.read = read
        self.device = device
        self._loaded: Loaded | None = None
        self._key = ""

    @property
    def fingerprint(self) -> str:
        """Of the base model in memory; empty when there is none."""
        return self._loaded.base.fingerprint if self._loaded else ""

    def as_here(self, job: Job) -> Job:
        """The job with this site's own device and data."""
        run = job.run.model_copy(update={"device": self.device})
        source = self.read.source or job.data.source
        return job.model_copy(
            update={"run": run, "data": job.data.model_copy(update={"source": source})}
        )

    def holds(self, job: Job) -> bool:
        """What the job needs is in memory."""
        return self._loaded is not None and self._key == _key(job)

    def hold(self, job: Job) -> Loaded:
        """Model and data of a job as it is here; what another job left is freed first.

        Raises:
            ConfigError, DataError, ModelError, AdapterError: see `load`.
        """
        # of this thread: torch's number of threads belongs to the one that computes
        torch.set_num_threads(job.run.threads)
        if self._loaded is not None and self.holds(job):
            return self._loaded
        self.drop()
        self._loaded = load_for_client(job, self.read)
        self._key = _key(job)
        return self._loaded

    def drop(self) -> None:
        """Gives the memory back to the system."""
        if self._loaded is None:
            return
        self._loaded, self._key = None, ""
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        # glibc keeps what was freed; other C libraries have no such call
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def _written(source: Path) -> list[tuple[str, int, int, int]]:
    """When the files of a source were written; a file that was changed must be read anew."""
    if not source.exists():
        return []
    files = sorted(source.rglob("*")) if source.is_dir() else [source]
    found = [(str(file), file.stat()) for file in files if file.is_file()]
    return [(name, stat.st_ino, stat.st_mtime_ns, stat.st_size) for name, stat in found]


def _key(job: Job) -> str:
    """Equal for two jobs that need the same model and data in memory."""
    parts = {
        "model": job.model.model_dump(mode="json"),
        "data": job.data.model_dump(mode="json"),
        "partition": job.partition.model_dump(mode="json"),
        "adapter": job.adapter.model_dump(mode="json"),
        "seed": job.run.seed,
        "device": job.run.device,
        "written": [_written(Path(s)) for s in (job.data.source, job.data.test) if s],
    }
    return json.dumps(parts, sort_keys=True)
