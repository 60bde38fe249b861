"""SimulatedClients: all clients of a job on one model, each taking its turn with it."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from fedlora.client.site import site_with
from fedlora.client.state import Memory
from fedlora.config.job import Job
from fedlora.data.federated import ClientData
from fedlora.errors import FedloraError, StorageError
from fedlora.messages import ClientUpdate
from fedlora.models.loaded import Loaded
from fedlora.server.link import Task
from fedlora.simulation.scenario import Scenario
from fedlora.wire import encode_update

# (client, manifest, fetch) -> update; does one client's part of a round
Work = Callable[[str, bytes, Callable[[str], bytes]], ClientUpdate]


class SimulatedClients:
    """The clients of a job with its scenario.

    Args:
        job: the run's job.
        loaded: model and data.
        clients: which clients take part, with their data; by default all of `loaded`.

    Attributes:
        data: the clients' data, by name.
        scenario: who is absent, slow or hostile.

    Raises:
        ConfigError: a scenario that does not fit the clients.
    """

    def __init__(
        self, job: Job, loaded: Loaded, clients: Mapping[str, ClientData] | None = None
    ) -> None:
        self.job = job
        self.loaded = loaded
        self.data = dict(sorted((clients or loaded.data.clients).items()))
        self.scenario = Scenario(
            job.scenario,
            list(self.data),
            rank=loaded.initial.spec.rank,
            seed=job.run.seed,
            max_update_norm=job.federation.max_update_norm,
        )

    def work(
        self, client: str, manifest: bytes, fetch: Callable[[str], bytes], state: Memory
    ) -> ClientUpdate:
        """One client's honest part of a round, on poisoned data if it is such a client."""
        data = self.data[client]
        poisoned = self.scenario.poison(client, data.train, len(self.loaded.data.labels))
        data = dataclasses.replace(data, train=poisoned)
        return site_with(self.job, self.loaded, client, data, state).work(manifest, fetch)


@dataclass(frozen=True)
class Answer:
    """What a client made of its task.

    Attributes:
        manifest, payload: its update as sent; both empty when there is none.
        fetched: digests of the parts it asked for.
        error: why there is no update.
    """

    manifest: bytes
    payload: bytes
    fetched: frozenset[str]
    error: str = ""


def answer(
    work: Work,
    scenario: Scenario,
    task: Task,
    part: Callable[[str], bytes],
    encode: Callable[[ClientUpdate], tuple[bytes, bytes]] = encode_update,
) -> Answer:
    """Does a task as its client would, hostile ones included.

    Args:
        work: does the honest part.
        scenario: tampers with the update.
        part: digest -> bytes of a part on offer.
        encode: update -> (manifest, payload) as they are sent.

    Raises:
        StorageError: the client could not keep its state; no other client could.
    """
    fetched: set[str] = set()

    def fetch(digest: str) -> bytes:
        fetched.add(digest)
        return part(digest)

    try:
        update = work(task.client, task.manifest, fetch)
        manifest, payload = encode(scenario.tamper(update))
    except StorageError:
        raise
    except FedloraError as e:
        return Answer(b"", b"", frozenset(fetched), str(e))
    except Exception as e:  # memory that ran out, say; it must not end the round of the others
        why = f"{type(e).__name__}: {(str(e).splitlines() or [''])[0]}"
        return Answer(b"", b"", frozenset(fetched), why)
    return Answer(manifest, payload, frozenset(fetched))
