"""Federation: a run whose clients are all simulated, in this process or in Ray's workers."""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from fedlora.adapter import AdapterState
from fedlora.checkpoint import RunStore
from fedlora.client.site import Course
from fedlora.client.state import ClientState
from fedlora.config.job import Job
from fedlora.data.federated import ClientData, FederatedData
from fedlora.errors import ConfigError
from fedlora.messages import ClientUpdate
from fedlora.models.loaded import Loaded
from fedlora.privacy.secagg.session import MAX_CLIENTS, MIN_CLIENTS
from fedlora.server.link import Link, SecureLink
from fedlora.server.run import Emit, Run, Scores, metrics_log
from fedlora.simulation.clients import SimulatedClients
from fedlora.simulation.cohort import CohortLink
from fedlora.simulation.cohort_rule import cohort_width, evaluation_width
from fedlora.simulation.engine import check_engine, ray_link
from fedlora.simulation.local import LocalLink
from fedlora.simulation.scoring import Judged, mean_scores, score_each
from fedlora.simulation.secure_local import SecureLocalLink
from fedlora.simulation.virtual import VirtualLink
from fedlora.strategies.base import StrategyState

if TYPE_CHECKING:
    from fedlora.simulation.ray_pool import Pool


class Federation(Run):
    """One simulated run: its job, its clients and its folder.

    Attributes:
        width: how many clients are trained together.

    Args:
        job: the run's job.
        loaded: model and data.
        clients: which clients take part, with their data; by default all of `loaded`.
        emit: receives every event, besides metrics.jsonl.
        progress: called with a client's name when its work begins.
        pool: with run.engine = "ray", workers to use and to leave running; by default the run
            starts and ends its own.
    """

    def __init__(
        self,
        job: Job,
        loaded: Loaded,
        *,
        clients: Mapping[str, ClientData] | None = None,
        emit: Emit | None = None,
        progress: Callable[[str], None] | None = None,
        pool: "Pool | None" = None,
    ) -> None:
        super().__init__(job, loaded, emit)
        check_engine(job)
        self._simulated = SimulatedClients(job, loaded, clients)
        self.clients = self._simulated.data
        self.scenario = self._simulated.scenario
        self.check([client.rank for client in self.scenario.clients])
        federation = job.federation
        if federation.mode == "async" and federation.buffer > len(self.clients):
            raise ConfigError(
                f"federation.buffer = {federation.buffer} is more than the {len(self.clients)} "
                "clients of the federation; choose at most that"
            )
        asked = min(federation.clients_per_round or len(self.clients), len(self.clients))
        if federation.secure_aggregation and not MIN_CLIENTS <= asked <= MAX_CLIENTS:
            raise ConfigError(
                f"federation.secure_aggregation = true needs {MIN_CLIENTS} to {MAX_CLIENTS} "
                f"clients per round; there are {asked}: set federation.clients_per_round"
            )
        self._folder = Path()
        self.width = cohort_width(job, loaded)
        self._virtual: VirtualLink
        if job.run.engine == "ray":
            self._virtual = ray_link(self._simulated, self._state, progress, self._differs, pool)
        else:
            self._virtual = self._local_link(progress)
        self.link: Link = self._virtual

    def start(self, folder: Path) -> RunStore:
        """Creates the run folder with round 0 and reports the start.

        Raises:
            RunFolderError: the folder is not empty.
            StorageError: the disk refused.
        """
        clients = {
            info.name: {
                "train": len(self.clients[info.name].train),
                "validation": len(self.clients[info.name].validation),
                "composition": self.clients[info.name].composition,
                "rank": info.rank,
                "hostile": list(self.scenario.kinds(info.name)),
            }
            for info in self.scenario.clients
        }
        return self.create(
            folder,
            {
                "engine": self.job.run.engine,
                "cohort": asdict(self.width),
                "evaluation_cohort": asdict(evaluation_width(self.job, self.loaded)),
                "clients": clients,
                "unusable": _unusable(self.loaded.data),
            },
        )

    def run(self, store: RunStore, until: int | None = None) -> StrategyState:
        """Runs from the last committed round to `until` (by default the end); see `Run.go`."""
        self._folder = store.folder
        self._log = metrics_log(store)
        self._virtual.held.remember(store.folder / "held.json", store.load().round)
        secure = self.job.federation.secure_aggregation
        try:
            return self.go(
                store,
                self.link,
                evaluate=self._evaluate,
                asynchronous=self._virtual,
                secure=cast(SecureLink, self.link) if secure else None,
                until=until,
            )
        finally:
            self._virtual.close()

    def personal(self, client: str, adapter: AdapterState, number: int) -> AdapterState:
        """The adapter of one client after round `number`: the global one but for its own part."""
        memory = self._state(client).before(number + 1)
        kept = {
            name: tensor
            for key, tensor in memory.items()
            if (name := key.removeprefix("kept.")) != key
        }
        return AdapterState(adapter.spec, {**adapter.tensors, **kept})

    def global_scores(self, adapter: AdapterState, number: int) -> Scores:
        """Figures after round `number` on the global test data.

        Of the adapter; or, for a personal strategy, the mean over all clients' own adapters.
        """
        test = self.loaded.data.test
        if not self.strategy.personal:
            self.hold(adapter)
            return self.scores(test)
        own = [Judged(partial(self.personal, name, adapter, number), test) for name in self.clients]
        return mean_scores(score_each(self, own))

    def _local_link(self, progress: Callable[[str], None] | None) -> VirtualLink:
        federation = self.job.federation
        if self.width.clients > 1:
            return CohortLink(
                self.scenario,
                self._course,
                self.loaded.adapted,
                self.job,
                self.loaded.processor.pad_id,
                self.width.clients,
                progress,
            )
        if not federation.secure_aggregation:
            return LocalLink(self.scenario, self._work, progress)
        uniform = federation.weighting == "uniform"
        weights = {
            name: 1 if uniform else max(1, len(data.train)) for name, data in self.clients.items()
        }
        return SecureLocalLink(
            self.scenario,
            self._work,
            progress,
            weights=weights,
            job_sha256=self.job.digest(),
            seed=self.job.run.seed,
        )

    def _evaluate(self, state: StrategyState, adapter: AdapterState) -> Mapping[str, float]:
        return self.global_scores(adapter, state.round)

    def _state(self, client: str) -> ClientState:
        return ClientState(self._folder / "clients" / client)

    def _differs(self, why: str) -> None:
        event = {"event": "machine", "round": 0, "why": why}
        self._log.append(event)
        self.emit(event)

    def _work(self, client: str, manifest: bytes, fetch: Callable[[str], bytes]) -> ClientUpdate:
        return self._simulated.work(
            client, manifest, fetch, self._state(client), self._folder / "ledgers"
        )

    def _course(self, client: str, manifest: bytes, fetch: Callable[[str], bytes]) -> Course:
        return self._simulated.course(
            client, manifest, fetch, self._state(client), self._folder / "ledgers"
        )


def _unusable(data: FederatedData) -> dict[str, Any]:
    """Counts by reason, and where the first rows of each reason came from."""
    first = {reason: origins[:5] for reason, origins in data.unusable.dropped.items()}
    return {"counts": data.unusable.counts, "first": first}
