"""A deployed run: from its job to its end, in the ServerApp's process."""

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from flwr.serverapp import Grid

from fedlora.adapter import AdapterState
from fedlora.checkpoint import RunStore
from fedlora.config.job import Job
from fedlora.config.load import dump_job, load_job
from fedlora.data.federated import load_federated
from fedlora.data.own import CLIENTS, held_out_only
from fedlora.errors import EXIT_FAILED, FedloraError, QuorumFailed, StorageError
from fedlora.logs import configure_from_environment, log_context
from fedlora.models.loaded import load
from fedlora.server.blob_store import BlobStore
from fedlora.server.deployable import check_deployable, wanted_clients
from fedlora.server.event_log import log_event
from fedlora.server.flower_link import FlowerLink
from fedlora.server.home import Home, Outcome, Place
from fedlora.server.journal import Event
from fedlora.server.mail import Mail
from fedlora.server.metrics import MetricsLog
from fedlora.server.nodes import Nodes
from fedlora.server.offers import Offers
from fedlora.server.results import close, is_finished, save
from fedlora.server.run import Emit, Run
from fedlora.server.settings import ServerSettings
from fedlora.server.soundness import global_adapter
from fedlora.strategies.base import StrategyState
from fedlora.tickets import ticket_key


def work_on(home: Home, place: Place, grid: Grid) -> None:
    """Starts or continues a run of a server's folder, whose lock is held, and keeps its outcome.

    Raises:
        FedloraError: the run failed; its outcome is kept.
    """
    run = place.run
    configure_from_environment()
    with log_context(run=run):
        journal = MetricsLog(place.events)
        try:
            settings = ServerSettings.read(home)
            store = BlobStore(home.exchange)
            offers = Offers(store, ticket_key(home.ticket_key), run, settings.exchange)
            job = load_job(place.job)

            def emit(event: Event) -> None:
                journal.append(event)
                log_event(event)

            deploy(
                _with_plugin(job, place),
                grid,
                place.folder,
                offers,
                emit,
                run,
                settings.device,
                journal,
                dump_job(job),
            )
        except FedloraError as e:
            _fail(place, journal, e.exit_code, str(e))
            raise
        except Exception as e:
            _fail(place, journal, EXIT_FAILED, f"{type(e).__name__}: {e}")
            raise
        # the last commit may be older than this process
        if not any(event["event"] == "end" for event in journal.read()):
            emit({"event": "end", "round": job.federation.rounds})
        place.end(Outcome("finished", 0))
        store.remove_run(run)


def _fail(place: Place, journal: MetricsLog, exit_code: int, why: str) -> None:
    # on a full disk neither may fit; then the run is tried again once there is space
    with suppress(StorageError):
        place.end(Outcome("failed", exit_code, why))
        journal.append({"event": "failed", "exit_code": exit_code, "why": why})


def _with_plugin(job: Job, place: Place) -> Job:
    """The job with its strategy's file where the server keeps it; clients need none."""
    _, plugin, name = job.federation.strategy.partition(".py:")
    if not plugin:
        return job
    federation = job.federation.model_copy(update={"strategy": f"{place.plugin}:{name}"})
    return job.model_copy(update={"federation": federation})


def deploy(
    job: Job,
    grid: Grid,
    folder: Path,
    offers: Offers | None,
    emit: Emit,
    run_id: str | None,
    device: str,
    journal: MetricsLog | None = None,
    job_for_clients: str | None = None,
) -> None:
    """Runs a job with the clients behind a Grid, from its last committed round to the end.

    Args:
        folder: the run's folder; made if it is not there.
        offers: the exchange; None when bytes ride in Flower's messages.
        emit: receives every event.
        run_id: lineage id of a new run.
        device: the server's own, for evaluation.
        journal: of events, brought in line with what was committed before a crash.
        job_for_clients: the job as clients get it; by default this one.

    Raises:
        FedloraError: the run failed; what was committed stands.
    """
    check_deployable(job)
    if (folder / "HEAD").is_file() and is_finished(folder):
        return
    here = job.model_copy(update={"run": job.run.model_copy(update={"device": device})})
    loaded = load(here, held_out_only if job.data.source == CLIENTS else load_federated)
    run = Run(job, loaded, emit)
    mail = Mail(grid)
    nodes = Nodes(mail, run.spec.rank, emit, equal_ranks=not run.strategy.hetero_rank)
    wanted, enough = wanted_clients(job)
    link = FlowerLink(
        job_for_clients or dump_job(job),
        run.spec.base_fingerprint,
        mail,
        nodes,
        offers,
        enough=enough,
        patience_s=job.federation.deadline_s,
        emit=emit,
    )
    clients = link.gather(wanted)
    if len(clients) < enough:
        refused = "".join(f"; node {n}: {why}" for n, why in sorted(nodes.refusals().items()))
        raise QuorumFailed(
            f"{len(clients)} of {wanted} clients joined within federation.deadline_s = "
            f"{job.federation.deadline_s:g} s; the quorum is {enough}{refused}. Start clients "
            "with: fedlora client, then continue with: fedlora resume"
        )
    run.check([client.rank for client in clients])
    if (folder / "HEAD").is_file():
        store = RunStore.open(folder, job.digest())
    else:
        facts = {"clients": {c.name: {"rank": c.rank} for c in clients}, "unusable": {"counts": {}}}
        store = run.create(folder, facts, run_id)
    try:
        if journal is not None:
            journal.reconcile(store, store.load().round)
        state = run.go(store, link, evaluate=_evaluation(run), least=enough)
        _finish(run, store, state, len(clients))
    finally:
        store.close()


def _evaluation(
    run: Run,
) -> Callable[[StrategyState, AdapterState], Mapping[str, float]] | None:
    # where every client has a part of its own, the server has no model to measure
    return None if run.strategy.personal or not run.loaded.data.test else partial(_scores, run)


def _scores(run: Run, state: StrategyState, adapter: AdapterState) -> Mapping[str, float]:
    run.hold(adapter)
    return run.scores(run.loaded.data.test)


def _finish(run: Run, store: RunStore, state: StrategyState, num_clients: int) -> None:
    started = time.perf_counter()
    adapter = global_adapter(run.strategy, state)
    save(run, adapter, store.folder / "adapter", num_clients)
    evaluate = _evaluation(run)
    summary: dict[str, Any] = {
        "task": run.job.model.task,
        "base": run.base_scores(),
        "global": dict(evaluate(state, adapter)) if evaluate else {},
        "clients": {},
        "baselines": {},
    }
    close(store.folder, state.round, summary, time.perf_counter() - started)
