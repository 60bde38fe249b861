"""Shamir's secret sharing of 32 bytes over the field of p = 2^256 + 297 elements.

Shamir, "How to Share a Secret", CACM 1979, https://doi.org/10.1145/359168.359176. The secret
is the value at zero of a random polynomial of degree t - 1: t values determine it, t - 1 say
nothing.
"""

from collections.abc import Callable, Iterable, Mapping
from itertools import islice

# the smallest prime above 2^256, so that any 32 bytes are an element
PRIME = 2**256 + 297
SHARE_BYTES = 33
SECRET_BYTES = 32

Entropy = Callable[[int], bytes]


def split(secret: bytes, threshold: int, points: Iterable[int], entropy: Entropy) -> dict[int, int]:
    """Point -> share.

    Args:
        secret: 32 bytes.
        threshold: shares that are needed.
        points: where the polynomial is evaluated; none of them zero.
        entropy: count -> so many random bytes.
    """
    assert len(secret) == SECRET_BYTES
    coefficients = [int.from_bytes(secret, "big")]
    coefficients += [_element(entropy) for _ in range(threshold - 1)]
    return {point: _value(coefficients, point) for point in points}


def join(shares: Mapping[int, int], threshold: int) -> bytes | None:
    """The secret of the first `threshold` shares, by Lagrange's formula at zero.

    None when what comes out is no 32 bytes, so that a share must be wrong.
    """
    used = dict(islice(sorted(shares.items()), threshold))
    assert len(used) == threshold, "callers count shares first"
    total = 0
    for point, share in used.items():
        above = below = 1
        for other in used:
            if other != point:
                above = above * other % PRIME
                below = below * (other - point) % PRIME
        total += share * above * pow(below, -1, PRIME)
    total %= PRIME
    return total.to_bytes(SECRET_BYTES, "big") if total < 2**256 else None


def _value(coefficients: list[int], point: int) -> int:
    assert point % PRIME, "the value at zero is the secret"
    value = 0
    for coefficient in reversed(coefficients):
        value = (value * point + coefficient) % PRIME
    return value


def _element(entropy: Entropy) -> int:
    """A uniform element: 257 bits, drawn again while they are p or more."""
    while True:
        value = int.from_bytes(entropy(SHARE_BYTES), "big") & (2**257 - 1)
        if value < PRIME:
            return value
