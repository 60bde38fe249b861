"""Messages of a session, each of one length that its receiver knows.

advert      two X25519 keys, commitment to the seed, weight, Ed25519 signature
keys        set of clients, then their adverts
boxes       per other client of `keys`: shares of the mask key and of the seed, encrypted
shares      set of clients, then the box of each of them for the receiver
masked      the vector
survivors   set of clients
signature   Ed25519 over keys, shares and survivors
signatures  set of clients, then their signatures
reveal      per client of `shares`: a share of its seed if it survived, else of its mask key
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import (
    Ed25519PrivateKey,
    Ed25519PublicKey,
)

from fedlora.errors import SecureAggregationError
from fedlora.privacy.secagg.layout import Cutter, indices, members, number
from fedlora.privacy.secagg.session import Session
from fedlora.privacy.secagg.shamir import PRIME, SHARE_BYTES

KEY_BYTES = 32
SIGNATURE_BYTES = 64
ADVERT_BYTES = 3 * KEY_BYTES + 8 + SIGNATURE_BYTES
# two shares and the tag of AES-GCM
BOX_BYTES = 2 * SHARE_BYTES + 16

Roster = Mapping[str, bytes]
"""Client -> its Ed25519 public key (32 bytes), known before and not from the server."""


@dataclass(frozen=True)
class Advert:
    """What a client tells all others.

    Attributes:
        channel: public key that shares for it are encrypted to.
        mask: public key that its pairwise masks come from.
        commitment: to the seed of its own mask.
        weight: its weight in the sum.
        signature: by the client's identity.
    """

    channel: bytes
    mask: bytes
    commitment: bytes
    weight: int
    signature: bytes = b""

    @property
    def body(self) -> bytes:
        """All but the signature."""
        return self.channel + self.mask + self.commitment + number(self.weight, 8)

    def signed(self, session: Session, client: str, identity: Ed25519PrivateKey) -> "Advert":
        """The advert with a signature."""
        signature = identity.sign(_advert_statement(session, client, self.body))
        return Advert(self.channel, self.mask, self.commitment, self.weight, signature)

    def encode(self) -> bytes:
        """The advert's bytes."""
        return self.body + self.signature

    @classmethod
    def decode(cls, data: bytes, session: Session, client: str, roster: Roster) -> "Advert":
        """The advert of `client` in these bytes, its signature verified.

        Raises:
            SecureAggregationError: malformed, or not signed by the client for this session.
        """
        cut = Cutter(data, "advert", client)
        found = cls(
            cut.take(KEY_BYTES),
            cut.take(KEY_BYTES),
            cut.take(KEY_BYTES),
            cut.number(8),
            cut.take(SIGNATURE_BYTES),
        )
        cut.end()
        if not found.weight:
            raise cut.malformed("has weight 0; expected 1 or more")
        verify(roster, client, found.signature, _advert_statement(session, client, found.body))
        return found


Adverts = Mapping[int, Advert]


def encode_keys(adverts: Adverts) -> bytes:
    """Everybody's adverts, by index."""
    ordered = sorted(adverts.items())
    return members(adverts) + b"".join(advert.encode() for _, advert in ordered)


def decode_keys(data: bytes, session: Session, roster: Roster) -> dict[int, Advert]:
    """Everybody's adverts, all signatures verified.

    Raises:
        SecureAggregationError: malformed, below the threshold, a key that is not its client's,
            or one that stands twice.
    """
    cut = Cutter(data, "list of keys")
    found = read_members(cut, session)
    at_least(session, found, "have sent keys")
    adverts = {
        i: Advert.decode(cut.take(ADVERT_BYTES), session, session.clients[i], roster) for i in found
    }
    cut.end()
    keys = [key for advert in adverts.values() for key in (advert.channel, advert.mask)]
    if len(set(keys)) != len(keys):
        raise cut.malformed("has one key twice")
    return adverts


def read_members(cut: Cutter, session: Session) -> tuple[int, ...]:
    """The next set of clients.

    Raises:
        SecureAggregationError: it has clients that are not of the session.
    """
    found = indices(cut.number(8))
    if found and found[-1] >= len(session.clients):
        raise cut.malformed(f"names client {found[-1]} of {len(session.clients)}")
    return found


def read_share(cut: Cutter) -> int:
    """The next share.

    Raises:
        SecureAggregationError: no element of the field.
    """
    share = cut.number(SHARE_BYTES)
    if share >= PRIME:
        raise cut.malformed("has a share beyond the field")
    return share


def at_least(session: Session, found: tuple[int, ...], what: str) -> None:
    """Raises SecureAggregationError unless the threshold is reached."""
    if len(found) < session.threshold:
        raise SecureAggregationError(
            f"{len(found)} of {len(session.clients)} clients {what}; secure aggregation needs "
            f"{session.threshold}"
        )


def survivors_statement(
    session: Session, keys: bytes, dealt: tuple[int, ...], survivors: tuple[int, ...]
) -> bytes:
    """What a client signs before it reveals a share.

    Args:
        keys: the list of keys, as it got it.
        dealt: who has dealt shares.
        survivors: who has sent a vector.
    """
    return session.statement(
        "survivors", hashlib.sha256(keys).digest(), members(dealt), members(survivors)
    )


def verify(roster: Roster, client: str, signature: bytes, statement: bytes) -> None:
    """Checks a signature.

    Raises:
        SecureAggregationError: it is not the client's, or the client has no key.
    """
    if client not in roster:
        raise SecureAggregationError(f"client {client!r} has no identity key here", client)
    try:
        Ed25519PublicKey.from_public_bytes(roster[client]).verify(signature, statement)
    except (InvalidSignature, ValueError) as e:
        raise SecureAggregationError(
            f"a signature of client {client!r} is not by its key over this session", client
        ) from e


def _advert_statement(session: Session, client: str, body: bytes) -> bytes:
    return session.statement("advert", client.encode(), body)
