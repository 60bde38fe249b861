"""Slots that would never learn again."""

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from fedlora.linalg import fill_dead, stack, truncate
from tests.linalg.drawn import SEEDS, dense, generator, randn


@given(
    st.integers(1, 6),
    st.integers(1, 6),
    st.integers(1, 12),
    st.lists(st.sampled_from(["live", "dead", "b zero", "a zero"]), min_size=6, max_size=6),
    st.sampled_from([torch.float32, torch.float64]),
    SEEDS,
)
def test_dead_slots_get_a_row_and_nothing_else_changes(d, r, k, kinds, dtype, seed):
    draws = generator(seed)
    b, a = randn(d, r, draws=draws).to(dtype), randn(r, k, draws=draws).to(dtype)
    for j, kind in enumerate(kinds[:r]):
        if kind in ("dead", "b zero"):
            b[:, j] = 0.0
        if kind in ("dead", "a zero"):
            a[j] = 0.0
    dead = torch.tensor([kind == "dead" for kind in kinds[:r]])
    new_b, new_a = fill_dead(b, a, generator(seed))
    assert new_a.dtype == dtype
    assert torch.equal(new_b, b)
    assert torch.equal(new_a[~dead], a[~dead])
    assert torch.equal(new_b @ new_a, b @ a)
    norms = new_a[dead].norm(dim=1)
    torch.testing.assert_close(norms, torch.full_like(norms, 1 / math.sqrt(3)))
    if r <= k:
        cosines = torch.nn.functional.normalize(new_a, dim=1)
        cosines = cosines[dead] @ cosines.T
        expected = torch.eye(r, dtype=dtype)[dead]
        torch.testing.assert_close(cosines, expected, rtol=0, atol=1e-6)


def test_the_fill_is_drawn_from_the_generator_and_only_when_needed():
    b, a = torch.zeros(5, 3), torch.zeros(3, 6)
    one, same, other = (fill_dead(b, a, generator(seed))[1] for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    draws = generator(1)
    fill_dead(torch.ones(5, 3), a, draws)
    assert torch.equal(draws.get_state(), generator(1).get_state())


def test_a_truncation_that_found_too_little_is_completed():
    """Identical clients of rank 2 fill 2 of 5 slots; the others learn again, product kept."""
    draws = generator(6)
    client = randn(12, 2, draws=draws), randn(2, 9, draws=draws)
    b, a, _ = truncate(*stack([client] * 4, [0.25] * 4), 5)
    new_b, new_a = fill_dead(b, a, generator(0))
    assert ((b == 0).all(dim=0) & (a == 0).all(dim=1)).sum() == 3
    assert (new_a != 0).any(dim=1).all()
    torch.testing.assert_close(new_b @ new_a, dense(client), rtol=1e-12, atol=1e-12)
