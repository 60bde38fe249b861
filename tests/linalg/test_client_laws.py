"""What low-rank algebra must give whoever the clients are."""

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from fedlora.linalg import difference, gram_kernel, product_norm, recompress, stack, truncate
from tests.linalg.drawn import SEEDS, clients, dense, generator, randn, scale_of


def server_step(factors, weights, rank):
    b, a, sigma = truncate(*stack(factors, weights), rank)
    return b, a, sigma[:rank]


def has_gaps(factors, weights, rank):
    """Singular vectors are determined: no two of the first rank + 1 values are close."""
    sigma = torch.linalg.svdvals(dense(stack(factors, weights)))[: rank + 1]
    return bool((sigma[:-1] - sigma[1:] > 1e-2 * sigma[0]).all())


def assert_same(found, expected):
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@given(clients(ranks=st.just(3)), st.floats(0.1, 4.0))
def test_the_error_of_averaging_factors_is_the_cross_term(drawn, s):
    """T - s mean(B) mean(A) = s sum_i p_i (B_i - mean B)(A_i - mean A), and its pair form."""
    factors, p = drawn
    n = len(p)
    mean_b, mean_a = (sum(w * f[j] for w, f in zip(p, factors, strict=True)) for j in (0, 1))
    error = difference(stack(factors, [s * w for w in p]), (s * mean_b, mean_a))
    centred = stack([(b - mean_b, a - mean_a) for b, a in factors], [s * w for w in p])
    two = [(i, j) for i in range(n) for j in range(n)]
    by_pairs = stack(
        [(factors[i][0] - factors[j][0], factors[i][1] - factors[j][1]) for i, j in two],
        [0.5 * s * p[i] * p[j] for i, j in two],
    )
    size = product_norm(*error)
    assert size > 1e-3 * s
    assert size == pytest.approx(float(dense(error).norm()), rel=1e-12)
    assert product_norm(*difference(error, centred)) <= 1e-12 * scale_of(*error)
    assert product_norm(*difference(error, by_pairs)) <= 1e-12 * scale_of(*error)
    assert len(truncate(*recompress(*centred), 1)[2]) <= (n - 1) * 3


@given(clients(), st.integers(1, 4), st.randoms(use_true_random=False))
def test_the_order_of_the_clients_does_not_matter(drawn, rank, random):
    factors, weights = drawn
    assume(has_gaps(factors, weights, rank))
    order = random.sample(range(len(weights)), len(weights))
    shuffled = server_step([factors[i] for i in order], [weights[i] for i in order], rank)
    assert_same(shuffled, server_step(factors, weights, rank))


@given(clients(), st.integers(1, 4))
def test_a_client_split_into_two_of_half_its_weight_changes_nothing(drawn, rank):
    factors, weights = drawn
    assume(has_gaps(factors, weights, rank))
    halves = [weights[0] / 2, weights[0] / 2, *weights[1:]]
    split = server_step([factors[0], *factors], halves, rank)
    whole = server_step(factors, weights, rank)
    assert_same(split[:2], whole[:2])
    shared = min(len(split[2]), len(whole[2]))
    assert_same((split[2][:shared],), (whole[2][:shared],))
    assert (split[2][shared:] < 1e-12).all()


@given(clients(), st.integers(1, 4), SEEDS)
def test_a_client_of_weight_zero_changes_nothing(drawn, rank, seed):
    factors, weights = drawn
    assume(has_gaps(factors, weights, rank))
    draws = generator(seed)
    (d, _), (_, k) = factors[0][0].shape, factors[0][1].shape
    extra = (randn(d, 2, draws=draws), 1e3 * randn(2, k, draws=draws))
    found = server_step([*factors, extra], [*weights, 0.0], rank)
    expected = server_step(factors, weights, rank)
    assert_same(found[:2], expected[:2])


def test_a_client_of_weight_zero_changes_no_kernel_but_its_own_entries():
    draws = generator(5)
    factors = [(randn(8, 2, draws=draws), randn(2, 6, draws=draws)) for _ in range(3)]
    nothing = (torch.zeros(8, 2, dtype=torch.float64), factors[0][1])
    kernel = gram_kernel([*factors, nothing])
    torch.testing.assert_close(kernel[:3, :3], gram_kernel(factors), rtol=1e-12, atol=1e-12)
    assert (kernel[3] == 0).all()
