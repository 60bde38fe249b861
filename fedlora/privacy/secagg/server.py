"""SecureServer: the server's part in one session.

Between two `close` methods it takes in what clients send; who sends nothing, or nothing that
is well formed, has dropped out. It keeps one vector, the sum so far.
"""

from collections.abc import Container, Iterable
from dataclasses import dataclass

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from fedlora.errors import SecureAggregationError
from fedlora.privacy.secagg.layout import Cutter, members
from fedlora.privacy.secagg.masks import (
    Vector,
    agreed,
    commitment,
    entry_type,
    pair_mask,
    self_mask,
)
from fedlora.privacy.secagg.messages import (
    BOX_BYTES,
    SIGNATURE_BYTES,
    Advert,
    Roster,
    at_least,
    encode_keys,
    read_share,
    survivors_statement,
    verify,
)
from fedlora.privacy.secagg.quantise import Quantiser, vector_size
from fedlora.privacy.secagg.session import Session
from fedlora.privacy.secagg.shamir import join

Indices = tuple[int, ...]


@dataclass(frozen=True)
class Total:
    """What a session ends with.

    Attributes:
        vector: sum of the survivors' vectors, modulo 2 ** bits.
        weight: sum of their weights.
        survivors: their names.
    """

    vector: Vector
    weight: int
    survivors: tuple[str, ...]


class SecureServer:
    """The server in a session.

    Args:
        session: what is summed.
        roster: every client's public key; the server refuses early what clients would refuse.
        max_weight: most weight that a client may claim.
    """

    def __init__(self, session: Session, roster: Roster, max_weight: int) -> None:
        self.session = session
        self._roster = roster
        self._max_weight = max_weight
        self._phase = "advert"
        self._adverts: dict[int, Advert] = {}
        self._boxes: dict[int, dict[int, bytes]] = {}
        self._sum = np.zeros(vector_size(session), entry_type(session.bits))
        self._sent: set[int] = set()
        self._signatures: dict[int, bytes] = {}
        self._revealed: dict[int, dict[int, int]] = {}
        self._keys = b""

    def take_advert(self, client: str, data: bytes) -> None:
        """Takes a client's keys in.

        Raises:
            SecureAggregationError: malformed, not signed by the client, or too much weight.
        """
        index = self._arrived("advert", client, self._adverts)
        advert = Advert.decode(data, self.session, client, self._roster)
        if advert.weight > self._max_weight:
            raise SecureAggregationError(
                f"client {client!r} claims weight {advert.weight}; expected at most "
                f"{self._max_weight}",
                client,
            )
        self._adverts[index] = advert

    def close_adverts(self) -> bytes:
        """Everybody's keys, for those who have sent theirs.

        Raises:
            SecureAggregationError: below the threshold, or weights that leave too few levels.
        """
        self._close("advert", "boxes", tuple(self._adverts), "have sent keys")
        self._keys = encode_keys(self._adverts)
        return self._keys

    @property
    def quantiser(self) -> Quantiser:
        """Reads this session's sum.

        Raises:
            SecureAggregationError: the clients' weights leave too few levels.
        """
        return Quantiser(self.session, sum(a.weight for a in self._adverts.values()))

    @property
    def advertised(self) -> tuple[str, ...]:
        """Who has sent keys."""
        return self._names(self._adverts)

    def weight(self, client: str) -> int:
        """The weight that a client has sent with its keys.

        Raises:
            SecureAggregationError: it has sent none.
        """
        index = self.session.index(client)
        if index not in self._adverts:
            raise SecureAggregationError(f"client {client!r} has sent no keys", client)
        return self._adverts[index].weight

    def take_boxes(self, client: str, data: bytes) -> None:
        """Takes in a client's encrypted shares for the others.

        Raises:
            SecureAggregationError: malformed.
        """
        index = self._arrived("boxes", client, self._boxes, among=self._adverts)
        cut = Cutter(data, "list of boxes", client)
        boxes = {i: cut.take(BOX_BYTES) for i in sorted(self._adverts) if i != index}
        cut.end()
        self._boxes[index] = boxes

    def close_boxes(self) -> dict[str, bytes]:
        """Client -> the shares that the others have for it, for those who have dealt theirs.

        Raises:
            SecureAggregationError: below the threshold.
        """
        dealt = self._close("boxes", "masked", tuple(self._boxes), "have dealt shares")
        head = members(dealt)
        return {
            self.session.clients[i]: head + b"".join(self._boxes[j][i] for j in dealt if j != i)
            for i in dealt
        }

    def take_masked(self, client: str, data: bytes) -> None:
        """Adds a client's masked vector to the sum.

        Raises:
            SecureAggregationError: of another length.
        """
        index = self._arrived("masked", client, self._sent, among=self._boxes)
        if len(data) != self._sum.nbytes:
            raise SecureAggregationError(
                f"the vector of client {client!r} has {len(data)} bytes; expected "
                f"{self._sum.nbytes}",
                client,
            )
        self._sum += np.frombuffer(data, self._sum.dtype)
        self._sent.add(index)

    def close_masked(self) -> bytes:
        """The set of survivors, for each of them.

        Raises:
            SecureAggregationError: below the threshold.
        """
        return members(self._close("masked", "signature", tuple(self._sent), "have sent a vector"))

    @property
    def survivors(self) -> tuple[str, ...]:
        """Who has sent a vector."""
        return self._names(self._sent)

    def take_signature(self, client: str, data: bytes) -> None:
        """Takes in a survivor's signature under the set of survivors.

        Raises:
            SecureAggregationError: not its signature under this set.
        """
        index = self._arrived("signature", client, self._signatures, among=self._sent)
        statement = survivors_statement(
            self.session, self._keys, tuple(self._boxes), tuple(self._sent)
        )
        if len(data) != SIGNATURE_BYTES:
            raise SecureAggregationError(
                f"the signature of client {client!r} has {len(data)} bytes; expected "
                f"{SIGNATURE_BYTES}",
                client,
            )
        verify(self._roster, client, data, statement)
        self._signatures[index] = data

    def close_signatures(self) -> bytes:
        """All signatures, for those who have signed.

        Raises:
            SecureAggregationError: below the threshold.
        """
        signed = self._close(
            "signature", "reveal", tuple(self._signatures), "have signed the set of survivors"
        )
        return members(signed) + b"".join(self._signatures[i] for i in signed)

    @property
    def signers(self) -> tuple[str, ...]:
        """Who has signed the set of survivors."""
        return self._names(self._signatures)

    def take_reveal(self, client: str, data: bytes) -> None:
        """Takes in the shares that a client reveals.

        Raises:
            SecureAggregationError: malformed.
        """
        index = self._arrived("reveal", client, self._revealed, among=self._signatures)
        cut = Cutter(data, "list of revealed shares", client)
        shares = {i: read_share(cut) for i in sorted(self._boxes)}
        cut.end()
        self._revealed[index] = shares

    def close_reveals(self) -> Total:
        """The sum of the survivors' vectors.

        Raises:
            SecureAggregationError: below the threshold, or shares that do not give what their
                client has committed to.
        """
        self._close("reveal", "over", tuple(self._revealed), "have revealed shares")
        total = self._sum.copy()
        for i in sorted(self._sent):
            seed = self._joined(i)
            if seed is None or commitment(self.session, seed) != self._adverts[i].commitment:
                raise self._wrong(i, "seed")
            total -= self_mask(self.session, seed, i, total.size)
        for i in sorted(self._boxes.keys() - self._sent):
            secret = self._joined(i)
            key = X25519PrivateKey.from_private_bytes(secret) if secret is not None else None
            mine = self._adverts[i].mask
            if key is None or key.public_key().public_bytes_raw() != mine:
                raise self._wrong(i, "mask key")
            for j in sorted(self._sent):
                total = self._without_pair(total, key, i, j)
        weight = sum(self._adverts[i].weight for i in self._sent)
        return Total(total, weight, self.survivors)

    def _without_pair(self, total: Vector, key: X25519PrivateKey, gone: int, here: int) -> Vector:
        """The sum without the mask that `here` shares with `gone`, which never cancelled."""
        mine, theirs = self._adverts[gone].mask, self._adverts[here].mask
        low, high = (mine, theirs) if gone < here else (theirs, mine)
        secret = agreed(key, theirs, self.session.clients[here])
        mask = pair_mask(self.session, secret, low, high, total.size)
        return total - mask if here < gone else total + mask

    def _joined(self, dealer: int) -> bytes | None:
        shares = {i + 1: revealed[dealer] for i, revealed in self._revealed.items()}
        return join(shares, self.session.threshold)

    def _wrong(self, dealer: int, what: str) -> SecureAggregationError:
        client = self.session.clients[dealer]
        return SecureAggregationError(
            f"the shares of client {client!r} do not give its {what}: it has dealt wrong ones, or "
            "another client has revealed one",
            client,
        )

    def _arrived(
        self, phase: str, client: str, held: Container[int], among: Container[int] | None = None
    ) -> int:
        """The index of a client whose message is due now, and has not come yet."""
        index = self.session.index(client)
        if phase != self._phase or index in held or (among is not None and index not in among):
            raise SecureAggregationError(
                f"client {client!r} sends a message ({phase}) that is not due: the session is at "
                f"({self._phase})",
                client,
            )
        return index

    def _names(self, found: Iterable[int]) -> tuple[str, ...]:
        return tuple(self.session.clients[i] for i in sorted(found))

    def _close(self, phase: str, then: str, found: Indices, what: str) -> Indices:
        assert phase == self._phase, "phases are closed in order"
        at_least(self.session, found, what)
        self._phase = then
        return tuple(sorted(found))
