"""Sums, inner products and norms of products against dense float64 matrices."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from fedlora.linalg import difference, gram_kernel, inner, product_norm, project, stack
from tests.linalg.drawn import SEEDS, SIZES, clients, dense, generator, pairs, randn, scale_of


@given(clients())
def test_stack_equals_the_dense_sum(drawn):
    factors, weights = drawn
    expected = sum(w * dense(p) for w, p in zip(weights, factors, strict=True))
    torch.testing.assert_close(dense(stack(factors, weights)), expected, rtol=1e-12, atol=1e-12)


@given(pairs())
def test_product_norm_equals_the_dense_norm(pair):
    assert abs(product_norm(*pair) - float(dense(pair).norm())) <= 1e-12 * scale_of(*pair)


@given(st.data(), SIZES, SIZES)
def test_inner_equals_the_dense_inner_product(data, d, k):
    one, other = (data.draw(pairs(d=st.just(d), k=st.just(k))) for _ in range(2))
    expected = float((dense(one) * dense(other)).sum())
    bound = 1e-12 * scale_of(*one) * scale_of(*other) * 14
    assert abs(inner(one, other) - expected) <= bound


@given(clients(ranks=st.integers(0, 4)))
def test_the_kernel_equals_the_dense_one(drawn):
    factors, _ = drawn
    flat = torch.stack([dense(p).flatten() for p in factors])
    kernel = gram_kernel(factors)
    torch.testing.assert_close(kernel, flat @ flat.T, rtol=1e-12, atol=1e-12)
    assert torch.equal(kernel, kernel.T)


@given(pairs(), st.integers(0, 5), SEEDS)
def test_project_equals_the_dense_product(pair, r, seed):
    rows = randn(r, pair[1].shape[1], draws=generator(seed))
    found = project(*pair, rows)
    assert found.dtype == torch.float64
    bound = 1e-12 * scale_of(*pair) * (1.0 + float(rows.norm())) * 14
    assert float((found - dense(pair) @ rows.T).norm()) <= bound


@given(st.data(), SIZES, SIZES)
def test_difference_equals_the_dense_one(data, d, k):
    one, other = (data.draw(pairs(d=st.just(d), k=st.just(k))) for _ in range(2))
    bound = 1e-12 * (scale_of(*one) + scale_of(*other))
    gap = dense(difference(one, other)) - (dense(one) - dense(other))
    assert float(gap.norm()) <= bound
