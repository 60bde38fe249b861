"""SecureLocalLink: simulated clients whose updates leave them masked."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedlora.client.secure import SecurePart
from fedlora.errors import SecureAggregationError
from fedlora.messages import ClientUpdate
from fedlora.server.link import Reply
from fedlora.simulation.clients import Answer, Work, answer
from fedlora.simulation.local import LocalLink
from fedlora.simulation.scenario import Scenario
from fedlora.simulation.virtual import Asked
from fedlora.wire import decode_broadcast


class SecureLocalLink(LocalLink):
    """A LocalLink for secure aggregation.

    Whoever the scenario has drop out of a round does so after it has dealt its shares, when it
    costs most; an update that was trained for an attempt without a sum is sent again in the
    next one. What a client signs is remembered as long as the process lives.

    Args:
        scenario: who exists, who is absent, slow or hostile.
        work: (client, manifest, fetch) -> update; does one client's part of a round.
        progress: called with a client's name when its work begins.
        weights: client -> its weight in sums.
        job_sha256: digest of the run's job.
        seed: the run's seed.
    """

    def __init__(
        self,
        scenario: Scenario,
        work: Work,
        progress: Callable[[str], None] | None = None,
        *,
        weights: Mapping[str, int],
        job_sha256: str,
        seed: int,
    ) -> None:
        super().__init__(scenario, work, progress)
        keys = {name: Ed25519PrivateKey.generate() for name in weights}
        self._roster = {name: key.public_key().public_bytes_raw() for name, key in keys.items()}
        self._parts = {
            name: SecurePart(
                name, key, self._roster, weight=weights[name], job_sha256=job_sha256, seed=seed
            )
            for name, key in keys.items()
        }
        # of the round that is under way: client -> (start, update)
        self._round = 0
        self._trained: dict[str, tuple[str, ClientUpdate]] = {}

    def identities(self) -> Mapping[str, bytes]:
        return self._roster

    def ask(self, step: str, messages: Mapping[str, bytes]) -> Iterator[Reply]:
        for client, message in messages.items():
            try:
                said = self._parts[client].answer(step, message)
            except SecureAggregationError as e:
                yield Reply(client, b"", b"", len(message), 0.0, error=str(e))
            else:
                yield Reply(client, b"", said, len(message), 0.0)

    def _answer(self, asked: Asked) -> Answer:
        self.progress(asked.client)
        part = self._parts[asked.client]
        return answer(
            self._once,
            self.scenario,
            asked.task,
            asked.parts.__getitem__,
            lambda update: part.masked(asked.broadcast, asked.task.shares, update),
        )

    def _once(self, client: str, manifest: bytes, fetch: Callable[[str], bytes]) -> ClientUpdate:
        """The client's update of a round, trained in the first attempt that it takes part in."""
        broadcast = decode_broadcast(manifest)
        plan, start = broadcast.plan, broadcast.start_sha256
        if plan.round != self._round:
            self._round, self._trained = plan.round, {}
        held = self._trained.get(client)
        if held is None or held[0] != start:
            held = (start, self.work(client, manifest, fetch))
            self._trained[client] = held
        return replace(held[1], attempt=plan.attempt)

    def _down(self, asked: Asked, fetched: frozenset[str]) -> int:
        return super()._down(asked, fetched) + len(asked.task.shares)
