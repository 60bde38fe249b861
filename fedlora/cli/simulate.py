"""`fedlora simulate` and `fedlora resume`"""

import gc
import json
import sys
import time
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

import typer

from fedlora.adapters import METHODS
from fedlora.checkpoint import RunStore
from fedlora.cli.live import LiveView
from fedlora.config.job import Job
from fedlora.config.load import load_job
from fedlora.errors import EXIT_INTERRUPTED, ConfigError
from fedlora.models.loaded import load
from fedlora.server.results import is_finished
from fedlora.simulation.engine import check_engine
from fedlora.simulation.federation import Federation
from fedlora.simulation.results import finish
from fedlora.strategies import STRATEGIES
from fedlora.strategies.plugin import make_strategy

KNOWN = {"adapter.method": list(METHODS), "federation.strategy": list(STRATEGIES)}


def read_job(path: Path | None, overrides: Sequence[str]) -> Job:
    """The job file, or the quickstart, with overrides applied and names checked."""
    if path is None:
        path = Path(str(files("fedlora.config") / "quickstart.toml"))
    return _absolute(load_job(path, overrides, KNOWN))


def _absolute(job: Job) -> Job:
    """The job with absolute paths, so that its run can be resumed from anywhere."""

    def whole(key: str, name: str | None) -> str | None:
        if not name:
            return name
        try:
            path = Path(name).expanduser()
            return str(path.absolute()) if path.exists() else name
        except (OSError, RuntimeError) as e:  # the latter for ~ with an unknown user
            why = e.strerror if isinstance(e, OSError) else e
            raise ConfigError(
                f"{key} = {name[:60]!r} cannot be looked up ({why}); correct the path"
            ) from e

    return job.model_copy(
        update={
            "model": job.model.model_copy(update={"name": whole("model.name", job.model.name)}),
            "data": job.data.model_copy(
                update={
                    "source": whole("data.source", job.data.source),
                    "test": whole("data.test", job.data.test),
                }
            ),
            "adapter": job.adapter.model_copy(
                update={"start": whole("adapter.start", job.adapter.start)}
            ),
        }
    )


def run_simulate(
    path: Path | None, out: Path | None, overrides: Sequence[str], *, as_json: bool
) -> None:
    """Runs a new federation."""
    job = read_job(path, overrides)
    check_engine(job)
    if job.adapter.start is None:
        # a wrong name or option need not wait for the model and the data
        make_strategy(job.federation, METHODS[job.adapter.method])
    folder = out or Path("runs") / f"{job.run.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    view = LiveView(job, folder, quiet=as_json)
    with view:
        federation = Federation(job, load(job), emit=view.event, progress=view.working)
        store = federation.start(folder)
        _drive(federation, store, view)
    _done(view, folder, as_json=as_json)


def run_resume(folder: Path, *, as_json: bool) -> None:
    """Continues a run folder."""
    job = load_job(folder / "job.toml") if (folder / "job.toml").is_file() else Job()
    check_engine(job)
    store = RunStore.open(folder, job.digest())
    store.load()
    view = LiveView(job, folder, quiet=as_json)
    if is_finished(folder):
        store.close()
        typer.echo(f"{folder} is finished; its report is {folder / 'report.html'}")
        return
    with view:
        federation = Federation(job, load(job), emit=view.event, progress=view.working)
        _drive(federation, store, view)
    _done(view, folder, as_json=as_json)


def _drive(federation: Federation, store: RunStore, view: LiveView) -> None:
    # model and libraries stay until the end, and looking for garbage among them takes a while
    gc.freeze()
    try:
        state = federation.run(store)
        view.finishing()
        view.summary = finish(federation, store, state, view.baseline_event)
    except KeyboardInterrupt:
        view.stop()
        print(
            f"interrupted; every committed round is kept. Continue with: "
            f"fedlora resume {store.folder}",
            file=sys.stderr,
        )
        sys.exit(EXIT_INTERRUPTED)
    finally:
        gc.unfreeze()
        store.close()


def _done(view: LiveView, folder: Path, *, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps({"folder": str(folder), **view.summary}))
    else:
        view.print_result()
