"""Shamir's shares and quantised vectors, against slow obvious references."""

import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.errors import SecureAggregationError
from fedlora.privacy.secagg.quantise import MAX_LOSS, Quantiser
from fedlora.privacy.secagg.shamir import PRIME, join, split
from tests.privacy.secagg_cases import make_session


def test_the_modulus_is_a_prime():
    """By Miller and Rabin, with forty bases: wrong with probability 4 ** -40."""
    odd, twos = PRIME - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    draws = random.Random(0)
    for _ in range(40):
        x = pow(draws.randrange(2, PRIME - 1), odd, PRIME)
        assert x == 1 or any(pow(x, 2**i, PRIME) == PRIME - 1 for i in range(twos))
    assert PRIME > 2**256


def solved(shares):
    """The polynomial through the shares by Gaussian elimination; its value at zero."""
    rows = [[pow(x, j, PRIME) for j in range(len(shares))] + [y] for x, y in shares.items()]
    for i in range(len(rows)):
        inverse = pow(rows[i][i], PRIME - 2, PRIME)
        rows[i] = [value * inverse % PRIME for value in rows[i]]
        for j in range(len(rows)):
            if j != i:
                factor = rows[j][i]
                rows[j] = [(a - factor * b) % PRIME for a, b in zip(rows[j], rows[i], strict=True)]
    return rows[0][-1]


@settings(max_examples=40)
@given(st.binary(min_size=32, max_size=32), st.integers(1, 8), st.integers(0, 9), st.randoms())
def test_any_threshold_of_shares_gives_the_secret(secret, threshold, more, draws):
    points = draws.sample(range(1, 65), threshold + more)
    shares = split(secret, threshold, points, random.Random(draws.random()).randbytes)
    chosen = {point: shares[point] for point in draws.sample(points, threshold)}
    assert join(chosen, threshold) == secret
    assert solved(chosen) == int.from_bytes(secret, "big")


def test_fewer_shares_fit_every_secret():
    """For t - 1 shares and any secret at all there is a polynomial that has dealt them."""
    secret, other = b"\x01" * 32, b"\xfe" * 32
    shares = split(secret, 3, [1, 2, 3], random.Random(0).randbytes)
    seen = {0: int.from_bytes(other, "big"), 1: shares[1], 2: shares[2]}
    # the share that a third client would hold, were the secret the other one
    third = (seen[0] - 3 * seen[1] + 3 * seen[2]) % PRIME
    assert join({1: shares[1], 2: shares[2], 3: third}, 3) == other


def test_a_wrong_share_is_no_secret_or_another_one():
    shares = split(bytes(32), 2, [1, 2], random.Random(0).randbytes)
    assert join({**shares, 1: (shares[1] + 1) % PRIME}, 2) != bytes(32)
    # 2^256 itself is an element of the field, and no 32 bytes
    assert join({1: 2**256, 2: 2**256}, 2) is None


def quantised(session, updates, weights, total=None, losses=None):
    kept = Quantiser(session, total or sum(weights))
    draws = torch.Generator().manual_seed(5)
    losses = losses or [None] * len(updates)
    vectors = [
        kept.vector(u, w, loss, draws) for u, w, loss in zip(updates, weights, losses, strict=True)
    ]
    return kept, kept.mean(sum(vectors[1:], vectors[0]), sum(weights))


@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("clip", [1e-4, 1.0, 1e4])
@settings(max_examples=25)
@given(data=st.data())
def test_the_mean_is_off_by_less_than_a_level(bits, clip, data):
    """Against the weighted mean in float64, for clients of any weights that may drop out."""
    session = make_session(5, bits=bits, sizes=(7, 3), clip=clip)
    count = data.draw(st.integers(3, 5))
    weights = data.draw(st.lists(st.integers(1, 9), min_size=count, max_size=count))
    draws = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    updates = [
        {
            "t0": clip * (2 * torch.rand(7, generator=draws, dtype=torch.float64) - 1),
            "t1": clip * torch.randn(3, 1, generator=draws, dtype=torch.float64).clamp(-1, 1),
        }
        for _ in weights
    ]
    dropped = data.draw(st.integers(0, 20))
    kept, mean = quantised(session, updates, weights, total=sum(weights) + dropped)
    level = clip / kept.levels
    for name, found in mean.tensors.items():
        exact = sum(w * u[name].reshape(-1) for u, w in zip(updates, weights, strict=True))
        gap = (found - exact / sum(weights)).abs().max()
        # beside rounding, float64 itself
        assert gap < level * (1 + 1e-9) + clip * 1e-14
    assert mean.saturated == 0
    assert mean.loss is None


def test_saturated_entries_are_clamped_and_counted():
    session = make_session(3, sizes=(4,), clip=0.5)
    updates = [
        {"t0": torch.tensor([0.5, -0.5, 0.6, -7.0])},
        {"t0": torch.tensor([0.0, 1e30, 0.1, 0.1])},
        {"t0": torch.zeros(4)},
    ]
    kept, mean = quantised(session, updates, [1, 2, 1])
    assert mean.saturated == 3
    clamped = sum(w * u["t0"].clamp(-0.5, 0.5) for u, w in zip(updates, [1, 2, 1], strict=True))
    assert torch.allclose(mean.tensors["t0"], clamped.double() / 4, atol=1 / kept.levels)


def test_the_loss_is_the_mean_of_those_who_have_one():
    session = make_session(4, sizes=(1,))
    updates = [{"t0": torch.zeros(1)}] * 4
    weights, losses = [1, 2, 3, 4], [0.5, None, 2.0, math.inf]
    _, mean = quantised(session, updates, weights, losses=losses)
    assert mean.loss == pytest.approx((0.5 + 3 * 2.0) / 4, abs=1e-9)
    _, mean = quantised(session, updates, weights, losses=[1e9] * 4)
    assert mean.loss == pytest.approx(MAX_LOSS)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_refused(value):
    kept = Quantiser(make_session(3, sizes=(2,)), 3)
    with pytest.raises(SecureAggregationError, match="t0 holds NaN or infinity"):
        kept.vector({"t0": torch.tensor([0.0, value])}, 1, None, torch.Generator())


@pytest.mark.parametrize("tensors", [{}, {"t1": 2}, {"t0": 2, "t1": 1}, {"t0": 3}])
def test_other_tensors_than_the_sessions_are_refused(tensors):
    kept = Quantiser(make_session(3, sizes=(2,)), 3)
    with pytest.raises(SecureAggregationError, match="expected"):
        kept.vector({k: torch.zeros(n) for k, n in tensors.items()}, 1, None, torch.Generator())


def test_weights_that_leave_too_few_levels_are_refused():
    with pytest.raises(SecureAggregationError, match="secure_bits = 64"):
        Quantiser(make_session(3, bits=32), 2**22)
    assert Quantiser(make_session(3, bits=64), 2**22).levels > 2**30


def test_vectors_with_one_seed_are_equal_to_the_bit():
    kept = Quantiser(make_session(3, bits=32, sizes=(99,)), 3)
    update = {"t0": torch.linspace(-1, 1, 99)}
    one, two = (kept.vector(update, 1, 0.1, torch.Generator().manual_seed(3)) for _ in range(2))
    assert np.array_equal(one, two)
