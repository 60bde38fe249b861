"""SimulatedClients: all clients of a job on one model, each taking its turn with it."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from fedlora.client.private import SitePrivacy
from fedlora.client.site import Course, Site, site_with
from fedlora.client.state import Memory
from fedlora.config.job import Job
from fedlora.data.federated import ClientData
from fedlora.errors import BudgetExhausted, ConfigError, FedloraError, LedgerError, StorageError
from fedlora.messages import ClientUpdate
from fedlora.models.loaded import Loaded
from fedlora.server.link import BUDGET_EXHAUSTED, Task
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
        self._private = job.privacy is not None and job.privacy.unit == "record"
        if self._private:
            _check_apart(self.data)

    def work(
        self,
        client: str,
        manifest: bytes,
        fetch: Callable[[str], bytes],
        state: Memory,
        ledgers: Path | None = None,
    ) -> ClientUpdate:
        """One client's honest part of a round, on poisoned data if it is such a client.

        Args:
            ledgers: the folder of all clients' privacy ledgers, which each hold one run.
        """
        return self._site(client, state, ledgers).work(manifest, fetch)

    def course(
        self,
        client: str,
        manifest: bytes,
        fetch: Callable[[str], bytes],
        state: Memory,
        ledgers: Path | None = None,
    ) -> Course:
        """The same, but for the training; see `Site.course`."""
        return self._site(client, state, ledgers).course(manifest, fetch)

    def _site(self, client: str, state: Memory, ledgers: Path | None) -> Site:
        data = self.data[client]
        poisoned = self.scenario.poison(client, data.train, len(self.loaded.data.labels))
        data = dataclasses.replace(data, train=poisoned)
        privacy = None
        if self._private:
            assert ledgers is not None, "private clients keep ledgers"
            privacy = SitePrivacy(self.job, data, ledgers / client)
        return site_with(self.job, self.loaded, client, data, state, privacy)


def _check_apart(clients: Mapping[str, ClientData]) -> None:
    """Refuses two clients with the same data, whose budgets would not know of each other."""
    seen: dict[tuple[bytes, ...], str] = {}
    for name, data in clients.items():
        records = tuple(sorted(data.records))
        if records in seen:
            raise ConfigError(
                f"clients {seen[records]!r} and {name!r} have the same data, so that each example "
                "would be spent twice and counted once; give them data of their own"
            )
        seen[records] = name


@dataclass(frozen=True)
class Answer:
    """What a client made of its task.

    Attributes:
        manifest, payload: its update as sent; both empty when there is none.
        fetched: digests of the parts it asked for.
        error: why there is no update.
        code: kind of that error, see `Reply`.
    """

    manifest: bytes
    payload: bytes
    fetched: frozenset[str]
    error: str = ""
    code: str = "CLIENT_ERROR"


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
        LedgerError: the client's privacy ledger cannot be trusted.
    """
    fetched: set[str] = set()

    def fetch(digest: str) -> bytes:
        fetched.add(digest)
        return part(digest)

    try:
        update = work(task.client, task.manifest, fetch)
        manifest, payload = encode(scenario.tamper(update))
    except Exception as e:
        return failure(e, fetched)
    return Answer(manifest, payload, frozenset(fetched))


def failure(error: Exception, fetched: Iterable[str]) -> Answer:
    """The answer of a client whose work ended so; it must not end the round of the others.

    Raises:
        StorageError, LedgerError: see `answer`.
    """
    if isinstance(error, StorageError | LedgerError):
        raise error
    why, code = str(error), "CLIENT_ERROR"
    if isinstance(error, BudgetExhausted):
        code = BUDGET_EXHAUSTED
    elif not isinstance(error, FedloraError):  # memory that ran out, say
        why = f"{type(error).__name__}: {(why.splitlines() or [''])[0]}"
    return Answer(b"", b"", frozenset(fetched), why, code)
