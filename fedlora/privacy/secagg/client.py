"""SecureClient: one client's part in one session.

Its methods are called once each, in order; what arrives from the server is believed only as
far as other clients have signed it.
"""

import hashlib
import secrets

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from fedlora.errors import SecureAggregationError
from fedlora.privacy.secagg.layout import Cutter
from fedlora.privacy.secagg.masks import (
    SEED_BYTES,
    Vector,
    agreed,
    commitment,
    derived,
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
    decode_keys,
    read_members,
    read_share,
    survivors_statement,
    verify,
)
from fedlora.privacy.secagg.quantise import Quantiser
from fedlora.privacy.secagg.session import Session, named
from fedlora.privacy.secagg.shamir import SHARE_BYTES, Entropy, split
from fedlora.privacy.secagg.signed import SignedSets

# a channel key encrypts one box, so that its nonce may be constant
_NONCE = bytes(12)


class SecureClient:
    """A client in a session.

    Args:
        session: what is summed; the caller has compared it with the round's plan.
        name: of the client.
        identity: its long-lived key.
        roster: everybody's public key.
        weight: its weight in the sum, which others will know.
        signed: what it has signed in earlier attempts.
        entropy: count -> random bytes; the operating system's.

    Raises:
        SecureAggregationError: the client is not in the session.
    """

    def __init__(
        self,
        session: Session,
        name: str,
        identity: Ed25519PrivateKey,
        roster: Roster,
        *,
        weight: int,
        signed: SignedSets,
        entropy: Entropy = secrets.token_bytes,
    ) -> None:
        self.session = session
        self.name = name
        self.index = session.index(name)
        self.weight = weight
        self._identity = identity
        self._roster = roster
        self._signed = signed
        self._entropy = entropy
        # fresh in every session
        self._channel = entropy(32)
        self._mask = entropy(32)
        self._seed = entropy(SEED_BYTES)
        self._step = 0
        self._keys = b""
        self._adverts: dict[int, Advert] = {}
        self._shares: dict[int, tuple[int, int]] = {}
        self._survivors: tuple[int, ...] = ()
        self._values_sha256 = ""

    def advertise(self) -> bytes:
        """The client's keys for this session, signed."""
        self._next(1)
        bare = Advert(
            _public(self._channel),
            _public(self._mask),
            commitment(self.session, self._seed),
            self.weight,
        )
        advert = bare.signed(self.session, self.name, self._identity)
        self._adverts = {self.index: advert}
        return advert.encode()

    def share(self, keys: bytes) -> bytes:
        """Shares of the client's secrets, encrypted for each of the others.

        Args:
            keys: everybody's keys.

        Raises:
            SecureAggregationError: malformed, too few, not signed by their clients, or without
                this client's own.
        """
        self._next(2)
        adverts = decode_keys(keys, self.session, self._roster)
        if adverts.get(self.index) != self._adverts[self.index]:
            raise SecureAggregationError(
                f"the list of keys does not hold what client {self.name!r} has sent"
            )
        self._keys, self._adverts = keys, adverts
        points = [i + 1 for i in adverts]
        threshold = self.session.threshold
        of_mask = split(self._mask, threshold, points, self._entropy)
        of_seed = split(self._seed, threshold, points, self._entropy)
        self._shares = {self.index: (of_mask[self.index + 1], of_seed[self.index + 1])}
        boxes = []
        for i in self._others():
            shares = (of_mask[i + 1], of_seed[i + 1])
            plain = b"".join(share.to_bytes(SHARE_BYTES, "big") for share in shares)
            boxes.append(AESGCM(self._channel_key(self.index, i)).encrypt(_NONCE, plain, None))
        return b"".join(boxes)

    @property
    def quantiser(self) -> Quantiser:
        """Makes this session's vectors; known once the keys are.

        Raises:
            SecureAggregationError: the clients' weights leave too few levels.
        """
        total = sum(advert.weight for advert in self._adverts.values())
        return Quantiser(self.session, total)

    def masked_input(self, shares: bytes, vector: Vector) -> bytes:
        """The client's vector under its masks.

        Args:
            shares: of the others' secrets.
            vector: by `quantiser`.

        Raises:
            SecureAggregationError: malformed, too few, or a share that does not decrypt.
        """
        self._next(3)
        self._receive(shares)
        assert vector.dtype == entry_type(self.session.bits), "made by the quantiser"
        self._values_sha256 = hashlib.sha256(vector.tobytes()).hexdigest()
        masked = vector + self_mask(self.session, self._seed, self.index, vector.size)
        mine = self._adverts[self.index].mask
        for i in self._shares:
            if i == self.index:
                continue
            theirs = self._adverts[i].mask
            low, high = (mine, theirs) if self.index < i else (theirs, mine)
            secret = agreed(_private(self._mask), theirs, self.session.clients[i])
            mask = pair_mask(self.session, secret, low, high, vector.size)
            masked = masked + mask if self.index < i else masked - mask
        return masked.tobytes()

    def sign(self, survivors: bytes) -> bytes:
        """A signature under the set of clients whose sum may be taken.

        Raises:
            SecureAggregationError: malformed, too few, without this client, with clients that
                dealt no shares, or after another sum of the same round.
        """
        self._next(4)
        cut = Cutter(survivors, "set of survivors")
        found = read_members(cut, self.session)
        cut.end()
        at_least(self.session, found, "have sent a vector")
        if self.index not in found or not self._shares.keys() >= set(found):
            raise SecureAggregationError(
                f"the server names as survivors {named(self.session, found)}; expected client "
                f"{self.name!r} itself, and nobody beside those who have dealt shares"
            )
        names = frozenset(self.session.clients[i] for i in found)
        self._signed.sign(self.session.run, self.session.round, names, self._values_sha256)
        self._survivors = found
        return self._identity.sign(self._statement())

    def reveal(self, signatures: bytes) -> bytes:
        """Shares of survivors' seeds and of the others' mask keys; never both of one client.

        Raises:
            SecureAggregationError: malformed, too few, or not all over the set that this client
                has signed.
        """
        self._next(5)
        cut = Cutter(signatures, "list of signatures")
        found = read_members(cut, self.session)
        at_least(self.session, found, "have signed the set of survivors")
        if not set(found) <= set(self._survivors):
            raise cut.malformed("has signatures of clients that are no survivors")
        for i in found:
            client = self.session.clients[i]
            verify(self._roster, client, cut.take(SIGNATURE_BYTES), self._statement())
        cut.end()
        revealed = [
            of_seed if i in self._survivors else of_mask
            for i, (of_mask, of_seed) in sorted(self._shares.items())
        ]
        return b"".join(share.to_bytes(SHARE_BYTES, "big") for share in revealed)

    def _receive(self, shares: bytes) -> None:
        cut = Cutter(shares, "list of shares")
        dealt = read_members(cut, self.session)
        at_least(self.session, dealt, "have dealt shares")
        if self.index not in dealt or not self._adverts.keys() >= set(dealt):
            raise cut.malformed("is not of clients that have sent keys, this one among them")
        for i in dealt:
            if i == self.index:
                continue
            client, box = self.session.clients[i], cut.take(BOX_BYTES)
            try:
                plain = AESGCM(self._channel_key(i, self.index)).decrypt(_NONCE, box, None)
            except InvalidTag as e:
                raise SecureAggregationError(
                    f"the share of client {client!r} for client {self.name!r} does not decrypt",
                    client,
                ) from e
            opened = Cutter(plain, "share", client)
            self._shares[i] = (read_share(opened), read_share(opened))
        cut.end()

    def _channel_key(self, sender: int, receiver: int) -> bytes:
        peer = receiver if sender == self.index else sender
        theirs = self._adverts[peer].channel
        secret = agreed(_private(self._channel), theirs, self.session.clients[peer])
        parties = [self._adverts[i].channel for i in (sender, receiver)]
        return derived(self.session, secret, "channel", *parties)

    def _statement(self) -> bytes:
        dealt = tuple(sorted(self._shares))
        return survivors_statement(self.session, self._keys, dealt, self._survivors)

    def _others(self) -> list[int]:
        return [i for i in sorted(self._adverts) if i != self.index]

    def _next(self, step: int) -> None:
        # a second vector under the same masks would show the difference of the two
        if step != self._step + 1:
            raise SecureAggregationError(
                f"client {self.name!r} is asked for step {step} of a session after step "
                f"{self._step}; each is taken once, in order"
            )
        self._step = step


def _private(key: bytes) -> X25519PrivateKey:
    return X25519PrivateKey.from_private_bytes(key)


def _public(key: bytes) -> bytes:
    return _private(key).public_key().public_bytes_raw()
