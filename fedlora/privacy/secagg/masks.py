"""Masks: streams of integers that cancel in a sum, or are taken off in the end.

A key is HKDF-SHA256 (https://www.rfc-editor.org/rfc/rfc5869) of an X25519 secret
(https://www.rfc-editor.org/rfc/rfc7748) or of a random seed; salt and info hold the session,
the purpose and both parties with their public keys, so that no key serves twice. A stream is
AES-256 in counter mode from zero, once per key.
"""

import hashlib

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES256
from cryptography.hazmat.primitives.ciphers.modes import CTR
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedlora.errors import SecureAggregationError
from fedlora.privacy.secagg.session import Session

Vector = npt.NDArray[np.unsignedinteger]

SEED_BYTES = 32
_ZERO = bytes(16)


def agreed(key: X25519PrivateKey, peer: bytes, client: str) -> bytes:
    """The secret shared with the holder of a public key.

    Raises:
        SecureAggregationError: the key of `client` makes a secret that anybody knows.
    """
    try:
        return key.exchange(X25519PublicKey.from_public_bytes(peer))
    except ValueError as e:
        raise SecureAggregationError(
            f"the public key of client {client!r} is a point of low order", client
        ) from e


def derived(session: Session, secret: bytes, kind: str, *pieces: bytes) -> bytes:
    """A key of 32 bytes for one purpose in one session."""
    info = session.statement(kind, *pieces)
    return HKDF(SHA256(), 32, salt=session.digest, info=info).derive(secret)


def pair_mask(session: Session, secret: bytes, low: bytes, high: bytes, size: int) -> Vector:
    """The mask of a pair; the client of lower index adds it, the other one subtracts it.

    Args:
        secret: agreed by the pair.
        low, high: public keys of the client of lower and of higher index.
        size: entries.
    """
    return stream(derived(session, secret, "pair mask", low, high), size, session.bits)


def self_mask(session: Session, seed: bytes, index: int, size: int) -> Vector:
    """The mask that a client adds for itself alone."""
    return stream(derived(session, seed, "self mask", bytes([index])), size, session.bits)


def commitment(session: Session, seed: bytes) -> bytes:
    """32 bytes that bind a client to its seed without telling it."""
    return hashlib.sha256(session.statement("seed", seed)).digest()


def stream(key: bytes, size: int, bits: int) -> Vector:
    """`size` uniform integers modulo 2 ** bits; a key must not be used twice."""
    encryptor = Cipher(AES256(key), CTR(_ZERO)).encryptor()
    return np.frombuffer(encryptor.update(bytes(size * bits // 8)), dtype=entry_type(bits))


def entry_type(bits: int) -> np.dtype[np.unsignedinteger]:
    """The type of a vector's entries; numpy's arithmetic on it is modulo 2 ** bits."""
    return np.dtype(f"<u{bits // 8}")
