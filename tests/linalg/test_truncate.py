"""Truncation and recompression against the dense singular value decomposition."""

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from fedlora.errors import StrategyError
from fedlora.linalg import fill_dead, recompress, stack, truncate
from tests.linalg.drawn import SEEDS, SPLITS, clients, dense, generator, pairs, randn, scale_of


@given(pairs(), st.integers(0, 16), SPLITS)
def test_truncation_leaves_exactly_the_tail_of_the_dense_singular_values(pair, rank, split):
    product, scale = dense(pair), scale_of(*pair)
    b, a, sigma = truncate(*pair, rank, split=split)
    assert b.shape == (product.shape[0], rank)
    assert a.shape == (rank, product.shape[1])
    assert b.dtype == a.dtype == sigma.dtype == torch.float64
    expected = torch.linalg.svdvals(product)
    assert len(sigma) == min(*product.shape, pair[0].shape[1])
    torch.testing.assert_close(sigma, expected[: len(sigma)], rtol=0, atol=1e-12 * scale)
    assert float(expected[len(sigma) :].norm()) <= 1e-12 * scale
    assert (sigma[1:] <= sigma[:-1]).all()
    residual = float((product - b @ a).norm())
    assert abs(residual - float(expected[rank:].norm())) <= 1e-12 * scale


@given(pairs(), st.integers(1, 12), SPLITS)
def test_truncation_equals_the_dense_truncated_svd(pair, rank, split):
    product = dense(pair)
    u, sigma, vh = torch.linalg.svd(product, full_matrices=False)
    beyond = float(sigma[rank]) if rank < len(sigma) else 0.0
    # without a gap the best approximation is not unique
    assume(rank >= len(sigma) or sigma[rank - 1] - beyond > 0.1 * sigma[0])
    b, a, _ = truncate(*pair, rank, split=split)
    expected = (u[:, :rank] * sigma[:rank]) @ vh[:rank]
    assert float((b @ a - expected).norm()) <= 1e-12 * scale_of(*pair)


@given(pairs(), st.integers(0, 16))
def test_the_splits_put_the_singular_values_where_they_say(pair, rank):
    b, a, sigma = truncate(*pair, rank)
    live = int((a != 0).any(dim=1).sum())
    kept = sigma[:live]
    rows, values = torch.eye(live, dtype=torch.float64), torch.diag(kept)
    torch.testing.assert_close(a[:live] @ a[:live].T, rows, rtol=0, atol=1e-13)
    torch.testing.assert_close(b.norm(dim=0)[:live], kept, rtol=1e-12, atol=0)
    b, a, _ = truncate(*pair, rank, split="balanced")
    top = float(sigma[:1].sum())
    for gram in (a[:live] @ a[:live].T, b[:, :live].T @ b[:, :live]):
        torch.testing.assert_close(gram, values, rtol=0, atol=1e-13 * top)


@given(pairs(), st.integers(0, 16), SPLITS)
def test_slots_past_the_numerical_rank_are_zero_in_both_factors(pair, rank, split):
    b, a, sigma = truncate(*pair, rank, split=split)
    alive = (b != 0).any(dim=0)
    assert torch.equal(alive, (a != 0).any(dim=1))
    live = int(alive.sum())
    assert alive[:live].all()
    lost = sigma[live:rank]
    assert (lost <= 1e-12 * scale_of(*pair)).all()


@pytest.mark.parametrize("split", ["left", "balanced"])
def test_the_largest_entry_of_every_column_of_b_is_positive(split):
    draws = generator(3)
    b, _, _ = truncate(randn(40, 9, draws=draws), randn(9, 30, draws=draws), 6, split=split)
    assert (b.gather(0, b.abs().argmax(dim=0, keepdim=True)) > 0).all()


@given(st.integers(2, 8), st.lists(st.sampled_from([-1.0, 1.0]), min_size=8, max_size=8), SEEDS)
def test_of_tied_entries_the_first_is_positive(d, signs, seed):
    """Rounding differs between orders of the clients; it must not choose the sign."""
    draws = generator(seed)
    column = torch.tensor(signs[:d], dtype=torch.float64)[:, None]
    left = column * randn(1, 3, draws=draws)  # (d, 3), of rank 1
    b, _, _ = truncate(left, randn(3, 5, draws=draws), 1)
    torch.testing.assert_close(b / b.norm(), column * column[0] / math.sqrt(d))
    assert b[0] > 0


def test_a_scale_that_moves_from_one_factor_to_the_other_is_no_cancellation():
    """1e12 times 1e-12 is 1, however small that is beside the norms of the factors."""
    draws = generator(0)
    left, right = randn(20, 4, draws=draws), randn(4, 15, draws=draws)
    scale = torch.tensor([1e14, 1.0, 1e-14, 1e7], dtype=torch.float64)
    plain = truncate(left, right, 3)
    moved = truncate(left * scale, right / scale[:, None], 3)
    for found, expected in zip(moved, plain, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("split", ["left", "balanced"])
@pytest.mark.parametrize("how", ["left is zero", "right is zero", "cancels", "no columns"])
def test_a_product_of_zero_gives_zeros(how, split):
    draws = generator(1)
    left, right = randn(9, 3, draws=draws), randn(3, 7, draws=draws)
    if how == "left is zero":
        left = torch.zeros_like(left)
    elif how == "right is zero":
        right = torch.zeros_like(right)
    elif how == "cancels":
        left, right = stack([(left, right)] * 3, [0.5, 0.5, -1.0])
    else:
        left, right = left[:, :0], right[:0]
    b, a, sigma = truncate(left, right, 4, split=split)
    assert torch.equal(b, torch.zeros(9, 4, dtype=torch.float64))
    assert torch.equal(a, torch.zeros(4, 7, dtype=torch.float64))
    assert sigma.isfinite().all()
    small_left, small_right = recompress(left, right)
    assert small_left.shape == (9, 0)
    assert small_right.shape == (0, 7)


@given(pairs())
def test_recompression_loses_nothing_and_is_as_small_as_the_rank(pair):
    product, scale = dense(pair), scale_of(*pair)
    left, right = recompress(*pair, tol=1e-13)
    assert left.dtype == right.dtype == torch.float64
    assert float((left @ right - product).norm()) <= 1e-12 * scale
    assert left.shape[1] == right.shape[0] <= min(*product.shape, pair[0].shape[1])


@given(clients(), st.sampled_from([1e-7, 1e-3, 0.3]))
def test_recompression_keeps_what_exceeds_the_tolerance(drawn, tol):
    factors, weights = drawn
    twice = stack([*factors, *factors], [*weights, *weights])
    sigma = torch.linalg.svdvals(dense(twice))
    assume(((sigma / sigma[0] / tol).log().abs() > 1e-6).all())
    left, right = recompress(*twice, tol=tol)
    assert left.shape[1] == int((sigma > tol * sigma[0]).sum())
    lost = float((left @ right - dense(twice)).norm())
    assert abs(lost - float(sigma[left.shape[1] :].norm())) <= 1e-12 * scale_of(*twice)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("factor", [0, 1])
@pytest.mark.parametrize("call", [lambda p: truncate(*p, 2), lambda p: recompress(*p)])
def test_factors_that_are_not_finite_are_refused(call, factor, bad):
    draws = generator(0)
    pair = randn(5, 3, draws=draws), randn(3, 4, draws=draws)
    pair[factor][1, 1] = bad
    with pytest.raises(StrategyError, match=r"\(5, 3\) and \(3, 4\) is not finite"):
        call(pair)


def test_an_unknown_split_is_refused():
    with pytest.raises(StrategyError, match='"right"; expected "left" or "balanced"'):
        truncate(torch.ones(3, 1), torch.ones(1, 3), 1, split="right")


def test_the_same_input_gives_the_same_bits():
    draws = generator(2)
    left, right = randn(700, 96, draws=draws), randn(96, 900, draws=draws)
    first, second = (truncate(left.clone(), right.clone(), 16) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


def test_no_input_is_changed():
    draws = generator(4)
    b, a = randn(9, 4, draws=draws), randn(4, 7, draws=draws)
    b[:, 1], a[1] = 0.0, 0.0
    before = b.clone(), a.clone()
    truncate(b, a, 2)
    recompress(b, a)
    stack([(b, a)], [2.0])
    fill_dead(b, a, generator(0))
    assert torch.equal(b, before[0])
    assert torch.equal(a, before[1])
