"""Federation: a run whose clients all live in this process."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fedlora.adapter import AdapterState
from fedlora.checkpoint import RunStore
from fedlora.client.site import site_for
from fedlora.client.state import ClientState
from fedlora.config.job import Job
from fedlora.data.federated import ClientData, FederatedData
from fedlora.errors import ConfigError
from fedlora.messages import ClientUpdate
from fedlora.models.loaded import Loaded
from fedlora.server.link import Link
from fedlora.server.run import Emit, Run, Scores
from fedlora.simulation.local import LocalLink
from fedlora.simulation.scenario import Scenario
from fedlora.strategies.base import StrategyState


class Federation(Run):
    """One simulated run: its job, its clients and its folder.

    Args:
        job: the run's job.
        loaded: model and data.
        clients: which clients take part, with their data; by default all of `loaded`.
        emit: receives every event, besides metrics.jsonl.
        progress: called with a client's name when its work begins.
    """

    def __init__(
        self,
        job: Job,
        loaded: Loaded,
        *,
        clients: Mapping[str, ClientData] | None = None,
        emit: Emit | None = None,
        progress: Callable[[str], None] | None = None,
    ) -> None:
        super().__init__(job, loaded, emit)
        self.clients = dict(sorted((clients or loaded.data.clients).items()))
        self.scenario = Scenario(
            job.scenario,
            list(self.clients),
            rank=self.spec.rank,
            seed=job.run.seed,
            max_update_norm=job.federation.max_update_norm,
        )
        self.check([client.rank for client in self.scenario.clients])
        federation = job.federation
        if federation.mode == "async" and federation.buffer > len(self.clients):
            raise ConfigError(
                f"federation.buffer = {federation.buffer} is more than the {len(self.clients)} "
                "clients of the federation; choose at most that"
            )
        self._local = LocalLink(self.scenario, self._work, progress)
        self.link: Link = self._local
        self._folder = Path()

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
        return self.create(folder, {"clients": clients, "unusable": _unusable(self.loaded.data)})

    def run(self, store: RunStore, until: int | None = None) -> StrategyState:
        """Runs from the last committed round to `until` (by default the end); see `Run.go`."""
        self._folder = store.folder
        self._local.remember(store.folder / "held.json", store.load().round)
        return self.go(
            store, self.link, evaluate=self._evaluate, asynchronous=self._local, until=until
        )

    def personal(self, client: str, adapter: AdapterState, number: int) -> AdapterState:
        """The adapter of one client after round `number`: the global one but for its own part."""
        memory = ClientState(self._folder / "clients" / client).before(number + 1)
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
        found = []
        for name in self.clients:
            self.hold(self.personal(name, adapter, number))
            found.append(self.scores(test))
        shared = set.intersection(*(set(scores) for scores in found))
        return {key: sum(s[key] for s in found) / len(found) for key in sorted(shared)}

    def _evaluate(self, state: StrategyState, adapter: AdapterState) -> Mapping[str, float]:
        return self.global_scores(adapter, state.round)

    def _work(self, client: str, manifest: bytes, fetch: Callable[[str], bytes]) -> ClientUpdate:
        data = self.clients[client]
        poisoned = self.scenario.poison(client, data.train, len(self.loaded.data.labels))
        data = dataclasses.replace(data, train=poisoned)
        folder = self._folder / "clients" / client
        return site_for(self.job, self.loaded, client, data, folder).work(manifest, fetch)


def _unusable(data: FederatedData) -> dict[str, Any]:
    """Counts by reason, and where the first rows of each reason came from."""
    first = {reason: origins[:5] for reason, origins in data.unusable.dropped.items()}
    return {"counts": data.unusable.counts, "first": first}
