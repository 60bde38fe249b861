"""`fedlora run`, and `fedlora resume` of a run on a server."""

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import typer

from fedlora.cli.live import LiveView
from fedlora.cli.remote import REMOTE, Remote
from fedlora.cli.simulate import KNOWN
from fedlora.client.operator import Operator
from fedlora.config.job import Job
from fedlora.config.load import dump_job, load_job, parse_job_text
from fedlora.errors import EXIT_FAILED, EXIT_INTERRUPTED, ConfigError, RunFolderError
from fedlora.server.results import is_finished
from fedlora.storage import file_above, storage_errors
from fedlora.tls import TlsFiles


def run_run(
    path: Path | None,
    server: str,
    certs: Path | None,
    tls: TlsFiles | None,
    out: Path | None,
    overrides: Sequence[str],
    *,
    detach: bool,
    as_json: bool,
) -> None:
    """Starts a run on a server, and follows it to its end."""
    job = load_job(path, overrides, KNOWN)
    job = job.model_copy(update={"run": job.run.model_copy(update={"engine": "flower"})})
    plugin = _plugin(job)
    folder = out or Path("runs") / f"{job.run.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    _make(folder)
    text = dump_job(job)
    run = Operator(server, tls).submit(text, plugin)
    remote = Remote(server, run, str(certs.absolute()) if certs else None, text)
    remote.write(folder)
    if detach:
        typer.echo(json.dumps({"run": run, "folder": str(folder)}) if as_json else run)
    else:
        follow(remote, job, folder, as_json=as_json)


def resume_remote(folder: Path, *, as_json: bool) -> None:
    """Continues a run on its server, and follows it to its end."""
    remote = Remote.read(folder)
    if is_finished(folder):
        typer.echo(f"{folder} is finished; its report is {folder / 'report.html'}")
        return
    remote.operator().resume(remote.run)
    follow(remote, parse_job_text(remote.job), folder, as_json=as_json)


def follow(remote: Remote, job: Job, folder: Path, *, as_json: bool) -> None:
    """Shows a run until it ends, and fetches what it leaves into `folder`.

    Exits with the run's own code when it failed, and with 130 on Ctrl-C, which leaves the run
    to its server.
    """
    operator = remote.operator()
    view = LiveView(job, folder, quiet=as_json)
    failed = None
    try:
        with view:
            for event in operator.follow(remote.run):
                view.event(event)
                if event["event"] == "failed":
                    failed = event
    except KeyboardInterrupt:
        print(
            f"no longer following; the run goes on at {remote.server}. Follow it again with: "
            f"fedlora resume {folder}",
            file=sys.stderr,
        )
        sys.exit(EXIT_INTERRUPTED)
    if failed is not None:
        for line in str(failed.get("why", "the run failed")).splitlines():
            print(f"error: {line}", file=sys.stderr)
        sys.exit(int(failed.get("exit_code", EXIT_FAILED)))
    operator.fetch(remote.run, folder)
    view.summary = json.loads((folder / "summary.json").read_bytes())
    if as_json:
        typer.echo(json.dumps({"folder": str(folder), "run": remote.run, **view.summary}))
    else:
        view.print_result()


def _plugin(job: Job) -> bytes:
    """The file of the job's own strategy, which travels with it."""
    name, colon, _ = job.federation.strategy.partition(".py:")
    if not colon:
        return b""
    try:
        return Path(f"{name}.py").expanduser().read_bytes()
    except OSError as e:
        raise ConfigError(
            f"federation.strategy names the file {name}.py, which cannot be read ({e.strerror})"
        ) from e


def _make(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        again = f", or continue the run in it with: fedlora resume {folder}"
        raise RunFolderError(
            f"output folder {folder} exists and is not empty; choose another --out"
            f"{again if (folder / REMOTE).is_file() else ''}"
        )
    if above := file_above(folder):
        raise RunFolderError(f"output folder {folder}: {above} is a file; choose another --out")
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
