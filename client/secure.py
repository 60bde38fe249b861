"""SecurePart: one client's part in the secure sums of a run, whatever carries its messages."""

from dataclasses import replace

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedlora.adapter import AdapterState
from fedlora.errors import SecureAggregationError
from fedlora.messages import Broadcast, ClientUpdate
from fedlora.privacy.secagg.client import SecureClient
from fedlora.privacy.secagg.messages import Roster
from fedlora.privacy.secagg.session import Session
from fedlora.privacy.secagg.signed import SignedSets
from fedlora.privacy.secagg.work import work_digest
from fedlora.seeds import generator
from fedlora.wire import encode_update


class SecurePart:
    """A client with its long-lived key.

    Args:
        name: of the client.
        identity: signs its keys of every session.
        roster: everybody's public key; not from the server.
        weight: its weight in sums.
        job_sha256: digest of the job that it trains for.
        seed: the run's seed; rounding is drawn from it, masks are not.
    """

    def __init__(
        self,
        name: str,
        identity: Ed25519PrivateKey,
        roster: Roster,
        *,
        weight: int,
        job_sha256: str,
        seed: int,
    ) -> None:
        self.name = name
        self._identity = identity
        self._roster = roster
        self._weight = weight
        self._job_sha256 = job_sha256
        self._seed = seed
        self._signed = SignedSets()
        self._client: SecureClient | None = None

    def answer(self, step: str, message: bytes) -> bytes:
        """The answer to a message of the server, but for the one that asks for a vector.

        Args:
            step: "advertise", "share", "sign" or "reveal".

        Raises:
            SecureAggregationError: the message is refused.
        """
        if step == "advertise":
            # an attempt that is given up leaves nothing to the next one but what was signed
            self._client = SecureClient(
                Session.decode(message),
                self.name,
                self._identity,
                self._roster,
                weight=self._weight,
                signed=self._signed,
            )
            return self._client.advertise()
        steps = {
            "share": self._current.share,
            "sign": self._current.sign,
            "reveal": self._current.reveal,
        }
        if step not in steps:
            raise SecureAggregationError(
                f"{step[:40]!r} is no step of secure aggregation; expected advertise, "
                f"{', '.join(steps)}"
            )
        return steps[step](message)

    def masked(
        self, broadcast: Broadcast, shares: bytes, update: ClientUpdate
    ) -> tuple[bytes, bytes]:
        """(manifest, masked vector) of an update.

        The manifest is that of an update without tensors: it says who trained what, on how
        many examples, and holds no figure of the training.

        Raises:
            SecureAggregationError: the session is for another round or other work than the
                broadcast, the update has values that are not finite, or the shares are refused.
        """
        client, plan = self._current, broadcast.plan
        session = client.session
        found = (session.run, session.round, session.attempt)
        if session.work_sha256 != work_digest(self._job_sha256, broadcast):
            raise SecureAggregationError(
                f"client {self.name!r} is asked for other work than the session of round "
                f"{session.round}; everybody in a sum must be asked for the same"
            )
        if found != (plan.run, plan.round, plan.attempt):
            raise SecureAggregationError(
                f"the session is for round {session.round}, attempt {session.attempt} of run "
                f"{session.run!r}; expected round {plan.round}, attempt {plan.attempt} of run "
                f"{plan.run!r}"
            )
        vector = client.quantiser.vector(
            update.delta.tensors,
            self._weight,
            update.metrics.get("train_loss"),
            generator(self._seed, "rounding", self.name, plan.round),
        )
        bare = replace(
            update,
            delta=AdapterState(update.delta.spec, {}),
            num_examples=self._weight,
            metrics={},
        )
        manifest, _ = encode_update(bare)
        return manifest, client.masked_input(shares, vector)

    @property
    def _current(self) -> SecureClient:
        if self._client is None:
            raise SecureAggregationError(
                f"client {self.name!r} is in no session; expected the step advertise first"
            )
        return self._client
