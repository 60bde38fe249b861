"""FedSVD against the SVD of the dense product; Lee et al. 2505.12805, section 3."""

import pytest
import torch

from fedlora.adapters import METHODS
from fedlora.errors import ConfigError
from fedlora.strategies.fedsvd import FedSvd, orthonormalised
from tests.server.cases import make_spec, randn
from tests.strategies.rounds import check, make
from tests.strategies.stacked import clients, far, from_start, mean_of, own, step


def draw(*shape, seed):
    return randn(*shape, seed=seed, dtype=torch.float64)


def projection(a):
    """Onto the row space of A (r, k)."""
    return a.T @ torch.linalg.solve(a @ a.T, a)


@pytest.mark.parametrize("rank", [1, 2, 4])
@pytest.mark.parametrize(("d", "k"), [(9, 7), (4, 12)])
def test_the_product_stays_and_the_rows_become_orthonormal(d, k, rank):
    b, a = draw(d, rank, seed=1), draw(rank, k, seed=2)
    new_b, new_a = orthonormalised(b, a)
    torch.testing.assert_close(new_b @ new_a, b @ a, rtol=0, atol=1e-13)
    torch.testing.assert_close(new_a @ new_a.T, torch.eye(rank).double(), rtol=0, atol=1e-13)
    torch.testing.assert_close(projection(new_a), projection(a), rtol=0, atol=1e-12)
    # B = U S of the dense product
    sigma = torch.linalg.svdvals(b @ a)[:rank]
    torch.testing.assert_close(new_b.T @ new_b, (sigma**2).diag(), rtol=0, atol=1e-11)


@pytest.mark.parametrize("d", [9, 2])
def test_the_rows_complete_their_space_where_b_has_a_smaller_rank(d):
    """Columns of B that depend on each other, or fewer outputs than the rank."""
    b, a = draw(d, 4, seed=3), draw(4, 7, seed=4)
    b[:, 3] = b[:, 2] = b[:, 1]
    new_b, new_a = orthonormalised(b, a)
    torch.testing.assert_close(new_b @ new_a, b @ a, rtol=0, atol=1e-13)
    torch.testing.assert_close(new_a @ new_a.T, torch.eye(4).double(), rtol=0, atol=1e-13)
    torch.testing.assert_close(projection(new_a), projection(a), rtol=0, atol=1e-12)


def test_signs_do_not_depend_on_those_of_the_factors():
    b, a = draw(9, 3, seed=5), draw(3, 7, seed=6)
    flip = torch.tensor([1.0, -1.0, -1.0]).double()
    first, second = orthonormalised(b, a), orthonormalised(b * flip, flip[:, None] * a)
    for left, right in zip(first, second, strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=1e-12)


@pytest.mark.parametrize("method", ["lora", "rslora"])
def test_every_round_is_exact_and_keeps_the_row_space(method):
    chosen, state, _ = make("fedsvd", method)
    before = {n.name: projection(state.tensors[f"{n.name}.A"].double()) for n in state.spec.layers}
    for number in range(4):
        updates = clients(chosen, state, seed=10 * number)
        assert not [k for k in updates[0].delta.tensors if k.endswith(".A")]
        state = step(chosen, state, updates)
        assert far(own(state), mean_of(updates)) < 1e-6
        for layer in state.spec.layers:
            a = state.tensors[f"{layer.name}.A"].double()
            torch.testing.assert_close(a @ a.T, torch.eye(2).double(), rtol=0, atol=1e-6)
            torch.testing.assert_close(projection(a), before[layer.name], rtol=0, atol=1e-5)


def test_while_b_is_zero_the_rows_stay():
    chosen, state, _ = make("fedsvd")
    state = from_start(state)
    new = step(chosen, state, clients(chosen, state, size=0.0))
    for name, tensor in state.tensors.items():
        torch.testing.assert_close(new.tensors[name], tensor, rtol=1e-6, atol=0)
        assert not name.endswith(".A") or torch.equal(new.tensors[name], tensor)


@pytest.mark.parametrize(
    ("options", "rounds"),
    [
        ({}, {1, 2, 3, 4, 5, 6}),
        ({"period": 3}, {3, 6}),
        ({"warmup": 4}, {5, 6}),
        ({"period": 2, "warmup": 1}, {3, 5}),
    ],
)
def test_period_and_warmup_say_which_rounds_divide_the_product_anew(options, rounds):
    chosen = FedSvd(METHODS["lora"], options)
    _, state, _ = make("fedsvd")
    found = set()
    for number in range(1, 7):
        new = step(chosen, state, clients(chosen, state, seed=number))
        if not torch.equal(new.tensors["p.A"], state.tensors["p.A"]):
            found.add(number)
        state = new
    assert found == rounds


def test_noise_in_b_reaches_the_change_with_energy_d_times_r():
    """E |s N A|^2 = s^2 sigma^2 d r for N of variance sigma^2, by 4000 draws within 2%."""
    d, k, rank, s, sigma = 9, 7, 3, 2.0, 0.3
    _, a = orthonormalised(draw(d, rank, seed=7), draw(rank, k, seed=8))
    noise = sigma * draw(4000, d, rank, seed=9)
    energy = float((s * noise @ a).square().sum((1, 2)).mean())
    expected = s**2 * sigma**2 * d * rank
    assert abs(energy - expected) < 0.02 * expected


def test_the_gradient_of_b_is_at_most_that_of_the_weight():
    _, a = orthonormalised(draw(9, 3, seed=10), 40 * draw(3, 7, seed=11))
    for seed in range(20):
        g = draw(9, 7, seed=100 + seed)
        assert (g @ a.T).norm() <= g.norm()


def test_what_it_cannot_do_is_refused():
    chosen = FedSvd(METHODS["lora"])
    for unit in ("record", "client"):
        check(chosen, make_spec(), [2, 2], privacy=unit)
    with pytest.raises(ConfigError, match="needs equal ranks"):
        check(chosen, make_spec(), [2, 1])
    with pytest.raises(ConfigError, match="old moments mean nothing"):
        check(chosen, make_spec(), [2], optimizer_state="keep")
    for options in ({"period": 0}, {"warmup": -1}):
        with pytest.raises(ConfigError, match=r"(period = 0; expected 1|warmup = -1; expected 0)"):
            FedSvd(METHODS["lora"], options)
