"""`fedlora watch`: a run as it goes, wherever it runs."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from fedlora.cli.live import LiveView
from fedlora.cli.remote import REMOTE, Remote
from fedlora.client.operator import Operator
from fedlora.config.job import Job
from fedlora.config.load import load_job, parse_job_text
from fedlora.errors import EXIT_FAILED, RunFolderError
from fedlora.server.metrics import MetricsLog
from fedlora.tls import TlsFiles

LOOK_S = 0.25


def watch_folder(folder: Path, *, as_json: bool) -> None:
    """Shows the run in a folder until it ends: one of this machine, or one on a server."""
    if (folder / REMOTE).is_file():
        remote = Remote.read(folder)
        _show(
            remote.operator().follow(remote.run),
            parse_job_text(remote.job),
            folder,
            as_json=as_json,
        )
    elif (folder / "job.toml").is_file():
        _show(_local(folder), load_job(folder / "job.toml"), folder, as_json=as_json)
    else:
        raise RunFolderError(
            f"{folder} is not a run folder; give the folder that fedlora simulate or fedlora run "
            "wrote, or HOST:PORT of a server"
        )


def watch_server(server: str, tls: TlsFiles | None, run: str, *, as_json: bool) -> None:
    """Shows a run of a server (by default the newest) until it ends."""
    operator = Operator(server, tls)
    if not run:
        runs = operator.runs()
        if not runs:
            raise RunFolderError(f"server {server} has no run yet; start one with: fedlora run")
        run = runs[-1].run
    _show(operator.follow(run), Job(), Path(run), as_json=as_json)


def _show(events: Iterator[dict[str, Any]], job: Job, folder: Path, *, as_json: bool) -> None:
    failed = None
    with LiveView(job, folder, quiet=as_json) as view:
        for event in events:
            if as_json:
                typer.echo(json.dumps(event, sort_keys=True))
            view.event(event)
            failed = event if event["event"] == "failed" else None
    if failed is not None:
        raise typer.Exit(int(failed.get("exit_code", EXIT_FAILED)))


def _local(folder: Path) -> Iterator[dict[str, Any]]:
    """The events of a run on this machine, from the first on, until it ends."""
    log, seen = MetricsLog(folder / "metrics.jsonl"), 0
    while True:
        events = log.read()
        for event in events[seen:]:
            yield event
            if event["event"] == "end":
                return
        seen = len(events)
        time.sleep(LOOK_S)
