"""LoRA-FAIR against dense objectives; Bian et al. 2411.14961, section 4."""

from dataclasses import replace

import pytest
import torch

from fedlora.adapters import METHODS
from fedlora.errors import ConfigError
from fedlora.strategies.fair_cosine import Problem, gap_and_gradient, solve_cosine
from fedlora.strategies.fold import folds
from fedlora.strategies.lora_fair import LoraFair, solve_ridge
from tests.server.cases import randn
from tests.strategies.rounds import make
from tests.strategies.stacked import clients, far, from_start, given_to, mean_of, own, step


def draw(*shape, seed):
    return randn(*shape, seed=seed, dtype=torch.float64)


def case(seed, d=9, k=7, r=3, n=4, spread=0.5):
    """(T, mean B, mean A) of n clients around one adapter."""
    b = [draw(d, r, seed=seed) + spread * draw(d, r, seed=seed + 1 + i) for i in range(n)]
    a = [draw(r, k, seed=seed + 50) + spread * draw(r, k, seed=seed + 60 + i) for i in range(n)]
    dense = sum(x @ y for x, y in zip(b, a, strict=True)) / n
    return dense, sum(b) / n, sum(a) / n


def problem_of(dense, b, a):
    return Problem(b, a @ a.T, dense @ a.T, float(dense.norm()))


def cosine_of(dense, b, a):
    return float((dense * (b @ a)).sum() / dense.norm() / (b @ a).norm())


def cosine(problem, penalty=0.0, iterations=1000, rescale=False):
    found = solve_cosine(
        {"w": problem}, penalty=penalty, rate=0.01, iterations=iterations, rescale=rescale
    )
    return found["w"]


@pytest.mark.parametrize("relative", [0.01, 0.5, 10.0])
@pytest.mark.parametrize("seed", [0, 1000, 2000])
def test_ridge_minimises_the_dense_objective(seed, relative):
    """Zero gradient; below dB = 0; and the Frobenius error falls by mu |dB|^2 at least."""
    dense, b, a = case(seed)
    found = solve_ridge(problem_of(dense, b, a), relative)
    mu = relative * float((a @ a.T).trace()) / 3

    def objective(x):
        return ((dense - x @ a) ** 2).sum() + mu * ((x - b) ** 2).sum()

    leaf = found.clone().requires_grad_()
    objective(leaf).backward()
    assert float(leaf.grad.abs().max()) < 1e-10
    assert float(((dense - b @ a) @ a.T).norm()) > 1e-2
    assert objective(found) < objective(b)
    assert (dense - found @ a).norm() < (dense - b @ a).norm()


@pytest.mark.parametrize("dependent", [False, True])
def test_without_a_penalty_the_rest_is_orthogonal_to_the_rows_of_a(dependent):
    """(T - B A) A^T = 0, also where A has two equal rows; B keeps what A does not see."""
    dense, b, a = case(3)
    if dependent:
        a[2] = a[1]
    found = solve_ridge(problem_of(dense, b, a), 0.0)
    assert float(((dense - found @ a) @ a.T).abs().max()) < 1e-9
    if dependent:
        unseen = torch.tensor([0.0, 1.0, -1.0]).double()
        torch.testing.assert_close(found @ unseen, b @ unseen, rtol=1e-9, atol=1e-9)


def test_a_large_penalty_is_fedit():
    dense, b, a = case(4)
    torch.testing.assert_close(solve_ridge(problem_of(dense, b, a), 1e14), b, rtol=0, atol=1e-12)
    found = cosine(problem_of(dense, b, a), penalty=1e3)
    torch.testing.assert_close(found, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("solver", ["ridge", "cosine"])
@pytest.mark.parametrize("spread", ["equal", "one"])
def test_without_a_cross_term_it_is_fedit(solver, spread):
    _, state, _ = make("lora-fair")
    chosen = LoraFair(METHODS["lora"], {"solver": solver})
    fedit, _, _ = make("fedit")
    updates = clients(chosen, state)
    if spread == "equal":
        updates = [replace(up, delta=updates[0].delta) for up in updates]
    updates = updates[: 1 if spread == "one" else 3]
    new, plain = step(chosen, state, updates), step(fedit, state, updates)
    for name, tensor in plain.tensors.items():
        torch.testing.assert_close(new.tensors[name], tensor, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("solver", ["ridge", "cosine"])
def test_a_stays_as_averaged_and_the_base_is_left_alone(solver):
    _, state, _ = make("lora-fair")
    chosen = LoraFair(METHODS["lora"], {"solver": solver})
    updates = clients(chosen, state)
    fedit, _, _ = make("fedit")
    new, plain = step(chosen, state, updates), step(fedit, state, updates)
    assert not folds(new.tensors)
    assert new.tensors.keys() == plain.tensors.keys()
    for name in plain.tensors:
        assert torch.equal(new.tensors[name], plain.tensors[name]) == (not name.endswith(".B"))


@pytest.mark.parametrize("ranks", [(4, 4, 4), (1, 2, 4)])
@pytest.mark.parametrize("method", ["lora", "rslora"])
def test_a_round_solves_the_dense_ridge(method, ranks):
    """The scale s cancels; unequal ranks are padded for the means but not in T."""
    chosen, state, _ = make("lora-fair", method, rank=4)
    updates = clients(chosen, state, ranks)
    new = step(chosen, state, updates)
    total = sum(up.weight for up in updates)
    means = {}
    for name, old in state.tensors.items():
        means[name] = torch.zeros(old.shape, dtype=torch.float64)
        for up in updates:
            ended = up.trained[name]
            if name.endswith(".A"):
                means[name][: ended.shape[0]] += up.weight / total * ended
            elif name.endswith(".B"):
                means[name][:, : ended.shape[1]] += up.weight / total * ended
    for layer in state.spec.layers:
        b, a = means[f"{layer.name}.B"], means[f"{layer.name}.A"]
        dense = mean_of(updates)[layer.name] / layer.scale
        gram = a @ a.T
        shifted = gram + 0.5 * float(gram.trace()) / 4 * torch.eye(4).double()
        expected = b + (dense @ a.T - b @ gram) @ torch.linalg.inv(shifted)
        torch.testing.assert_close(
            new.tensors[f"{layer.name}.B"].double(), expected, rtol=1e-5, atol=1e-5
        )
        small, _ = given_to(chosen, new, 2)
        assert torch.equal(small[f"{layer.name}.B"], new.tensors[f"{layer.name}.B"][:, :2])


def test_it_is_nearer_to_the_mean_than_fedit():
    chosen, state, _ = make("lora-fair")
    fedit, _, _ = make("fedit")
    for seed in range(0, 100, 10):
        updates = clients(chosen, state, seed=seed)
        ideal = mean_of(updates)
        corrected, plain = (own(step(s, state, updates)) for s in (chosen, fedit))
        for name, dense in ideal.items():
            assert (corrected[name] - dense).norm() < (plain[name] - dense).norm()


def test_the_small_cosine_is_that_of_the_flattened_matrices():
    """Value and gradient against autograd on T and X A themselves."""
    dense, b, a = case(5)
    x = (b + 0.3 * draw(9, 3, seed=77)).requires_grad_()
    cosine = torch.nn.functional.cosine_similarity(dense.flatten(), (x @ a).flatten(), dim=0)
    (1 - cosine).backward()
    problem = problem_of(dense, b, a)
    gap, gradient = gap_and_gradient(
        x.detach()[None], problem.gram[None], problem.projected[None], dense.norm()[None]
    )
    assert abs(float(gap) - (1 - cosine.item())) < 1e-12
    torch.testing.assert_close(gradient[0], x.grad, rtol=1e-10, atol=1e-12)


def test_the_descent_in_few_coordinates_is_the_one_in_d():
    """The same steps on X (d, r) itself, for three layers of other shapes at once."""
    cases = {"w": case(6), "v": case(7, d=5, k=11), "u": case(8, r=2)}
    found = solve_cosine(
        {name: problem_of(*c) for name, c in cases.items()},
        penalty=0.01,
        rate=0.01,
        iterations=50,
        rescale=False,
    )
    for name, (dense, b, a) in cases.items():
        unit, x = b / b.norm(), b / b.norm()
        for _ in range(50):
            leaf = x.clone().requires_grad_()
            (1 - (dense * (leaf @ a)).sum() / dense.norm() / (leaf @ a).norm()).backward()
            moved = x - 0.01 * leaf.grad - unit
            x = unit + max(0.0, 1 - 1e-4 / float(moved.norm())) * moved
        torch.testing.assert_close(found[name], x * b.norm(), rtol=1e-9, atol=1e-9)
        assert float((x - unit).norm()) > 1e-4


@pytest.mark.parametrize("seed", [0, 1000, 2000, 3000])
def test_without_a_penalty_the_cosine_reaches_its_largest_value(seed):
    """cos_max = ||P L^-T||_F / t with G = L L^T: the share of T in the row space of A."""
    dense, b, a = case(seed, d=32, k=24, r=4, n=6, spread=1.0)
    lower = torch.linalg.cholesky(a @ a.T)
    most = float((dense @ a.T @ torch.linalg.inv(lower).T).norm() / dense.norm())
    found = cosine(problem_of(dense, b, a))
    assert cosine_of(dense, b, a) < most - 1e-3
    assert most - 1e-4 < cosine_of(dense, found, a) < most + 1e-12


def test_the_minimum_is_that_of_the_penalised_cosine():
    """Subgradient optimality: gradient of the cosine = -lambda dB / |dB| in units of |B|, or
    dB = 0 where that gradient is shorter than lambda.
    """
    dense, b, a = case(9)
    problem = problem_of(dense, b, a)
    found = cosine(problem, 0.01, iterations=20_000)
    _, gradient = gap_and_gradient(
        found[None], problem.gram[None], problem.projected[None], dense.norm()[None]
    )
    away = (found - b) / (found - b).norm()
    assert float((gradient[0] * b.norm() + 0.01 * away).norm()) < 3e-4
    assert float((cosine(problem, 1.0) - b).norm()) < 1e-12 * float(b.norm())


def test_the_penalty_keeps_b_near_its_mean():
    dense, b, a = case(9)
    moves = [float((cosine(problem_of(dense, b, a), p) - b).norm()) for p in (0.0, 0.01, 0.03, 0.1)]
    assert moves[0] > moves[1] > moves[2] > moves[3]


def test_the_length_may_be_chosen_after_the_direction():
    """<P, X> / <X G, X> is the multiple with the least Frobenius error."""
    dense, b, a = case(10)
    plain, scaled = (cosine(problem_of(dense, b, a), rescale=r) for r in (False, True))
    best = (dense * (plain @ a)).sum() / ((plain @ a) ** 2).sum()
    torch.testing.assert_close(scaled, best * plain, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("solver", ["ridge", "cosine"])
def test_the_first_round_may_leave_b_at_zero(solver):
    _, state, _ = make("lora-fair")
    state = from_start(state)
    chosen = LoraFair(METHODS["lora"], {"solver": solver})
    new = step(chosen, state, clients(chosen, state, size=0.0))
    for name, tensor in state.tensors.items():
        torch.testing.assert_close(new.tensors[name], tensor, rtol=1e-6, atol=0)


@pytest.mark.parametrize("solver", ["ridge", "cosine"])
def test_a_slot_that_nobody_held_can_learn_again(solver):
    _, state, _ = make("lora-fair", rank=4)
    chosen = LoraFair(METHODS["lora"], {"solver": solver})
    updates = clients(chosen, state, (1, 1, 2))
    new = step(chosen, state, updates)
    for layer in state.spec.layers:
        b, a = (new.tensors[f"{layer.name}.{f}"] for f in "BA")
        assert bool((a != 0).any(1).all())
        assert float(b[:, 2:].abs().max()) < 1e-6
    assert far(own(new), mean_of(updates)) < 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"solver": "newton"}, "solver = 'newton'; expected 'ridge' or 'cosine'"),
        ({"lambda_rel": -0.5}, "lambda_rel = -0.5; expected 0 or more"),
        ({"lambda": float("nan")}, "lambda = nan; expected 0 or more"),
        ({"iterations": -1}, "iterations = -1"),
        ({"rate": -1.0}, "rate = -1.0"),
    ],
)
def test_options_out_of_bounds_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        LoraFair(METHODS["lora"], options)
