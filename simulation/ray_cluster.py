"""The Ray cluster of a run: a given one, or one of this machine's own processors.

Neither changes a bit of the result, so both come from the environment and not from the job:
RAY_ADDRESS is the address of a cluster, as Ray itself reads it, and FEDLORA_RAY_WORKERS the
number of workers. Every machine of a cluster needs this version of fedlora and the job's model
and data under the same names; the run folder stays with the server.
"""

import math
import os
import warnings
from typing import Any

from fedlora.config.job import Job
from fedlora.errors import ConfigError

# what changes the bits of a matrix product, besides the processor
BITS = ("MKL_CBWR", "ATEN_CPU_CAPABILITY")
WORKERS = "FEDLORA_RAY_WORKERS"


class Cluster:
    """Ray as long as a run needs it.

    A Ray that this process has started before is used, and left running.

    Args:
        job: the run's job; its threads and device say what a worker needs.
        most: more workers than this would have nothing to do.

    Attributes:
        size: number of workers.

    Raises:
        ConfigError: no such cluster, or one too small for a worker.
    """

    def __init__(self, job: Job, most: int) -> None:
        import ray

        self._ray = ray
        threads, gpu = job.run.threads, job.run.device.startswith("cuda")
        asked = _asked()
        self._owned = not ray.is_initialized()
        if self._owned:
            _connect(ray, job, asked, most)
        found = ray.cluster_resources()
        slots = int(found.get("CPU", 0) // threads)
        gpus = found.get("GPU", 0) if gpu else 0
        self.size = min(asked or slots, most)
        if gpu and not asked:
            self.size = min(self.size, int(gpus))
        if not 1 <= self.size <= slots or (gpu and not gpus):
            self.close()
            raise ConfigError(
                f"the Ray cluster has {found.get('CPU', 0):.0f} processors and "
                f"{found.get('GPU', 0):.0f} GPUs, too few for {asked or 1} worker(s) of "
                f"run.threads = {threads} on run.device = {job.run.device!r}; set {WORKERS} "
                "to fewer or change the cluster"
            )
        environment = {name: os.environ[name] for name in BITS if name in os.environ}
        self._options: dict[str, Any] = {
            "num_cpus": threads,
            "num_gpus": 1 / math.ceil(self.size / gpus) if gpu else 0,
            "max_restarts": 0,
            "max_task_retries": 0,
            "max_concurrency": 1,
        }
        if environment:
            self._options["runtime_env"] = {"env_vars": environment}

    def start(self, worker: type) -> Any:
        """Starts a process with an object of this class; Ray's handle of it."""
        return self._ray.remote(worker).options(**self._options).remote()

    def close(self) -> None:
        """Ends what this run has started."""
        if self._owned and self._ray.is_initialized():
            self._ray.shutdown()


def _asked() -> int:
    text = os.environ.get(WORKERS, "")
    if text and not (text.isascii() and text.isdigit() and int(text)):
        raise ConfigError(f"{WORKERS} = {text[:40]!r} is no number of workers; give one from 1")
    return int(text or 0)


def _connect(ray: Any, job: Job, asked: int, most: int) -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # by default Ray's workers give way to everything else on the machine
    os.environ.setdefault("RAY_worker_niceness", "0")
    # Ray's tip on a variable of its own
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    address = os.environ.get("RAY_ADDRESS") or "local"
    more: dict[str, Any] = {}
    if address == "local":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        workers = min(asked or max(1, (cores or 1) // job.run.threads), most)
        more = {"num_cpus": workers * job.run.threads, "include_dashboard": False}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            ray.init(
                address,
                namespace="fedlora",
                log_to_driver=False,
                logging_level="ERROR",
                **more,
            )
    except (ConnectionError, RuntimeError, ValueError, OSError) as e:
        reason = (str(e).splitlines() or [type(e).__name__])[0]
        raise ConfigError(
            f"Ray at {address!r} cannot be used: {reason}; set RAY_ADDRESS to a running cluster, "
            "or unset it to start one here"
        ) from e
