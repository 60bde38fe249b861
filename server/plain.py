"""A run under plain Flower: `flwr run`, or Flower's own simulation, without a fedlora server."""

import json
import logging
import time
from pathlib import Path

from flwr.serverapp import Grid

from fedlora.config.job import Job
from fedlora.config.load import load_job, parse_job_text
from fedlora.server.hosted import deploy
from fedlora.server.journal import Event

log = logging.getLogger("fedlora")


def run_plainly(job_text: str, out: str, grid: Grid) -> None:
    """Runs a job whose bytes ride in Flower's messages.

    Args:
        job_text: path of a job file, or the TOML itself; empty for the default job.
        out: the run's folder; a run in it is continued. By default a new folder below
            ~/.fedlora/runs.
        grid: of the run.

    Raises:
        FedloraError: the job is wrong or the run failed.
    """
    job = read(job_text)
    name = f"{job.run.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder = Path(out).expanduser() if out else Path.home() / ".fedlora" / "runs" / name
    log.info("run folder: %s", folder)
    deploy(job, grid, folder, None, _say, None, job.run.device)


def read(job_text: str) -> Job:
    """The job in a file, or in TOML.

    Raises:
        ConfigError: it is neither, or wrong.
    """
    if "=" not in job_text:
        return load_job(Path(job_text).expanduser() if job_text else None)
    return parse_job_text(job_text)


def _say(event: Event) -> None:
    log.info("%s", json.dumps(event, sort_keys=True))
