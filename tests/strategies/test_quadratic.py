"""Which mechanism wins where, on a quadratic whose answers are known."""

import statistics

import pytest
import torch

from tests.strategies.quadratic import A, floor, gauss, relative_error, run, start, targets

SEEDS = (0, 1, 2)


@pytest.mark.parametrize("seed", SEEDS)
def test_alike_clients_leave_fedit_without_a_cross_term(seed):
    """h = 0: ten equal clients are one client, so factor averaging is exact and converges."""
    common, goals = targets(0.0, seed)
    trace = run("fedit", goals, seed=seed)
    alone = run("fedit", goals[:1], seed=seed)
    assert max(trace.cross_terms) < 1e-6
    assert all((x - y).norm() < 1e-4 for x, y in zip(trace.products, alone.products, strict=True))
    assert relative_error(trace, common) < 1e-3


@pytest.mark.parametrize("seed", SEEDS)
def test_the_cross_term_of_fedit_grows_with_heterogeneity_and_local_steps(seed):
    def cross_term(h, steps):
        trace = run("fedit", targets(h, seed)[1], seed=seed, rounds=10, steps=steps)
        return sum(trace.cross_terms) / 10

    few, many, most = cross_term(1.0, 5), cross_term(1.0, 20), cross_term(2.0, 20)
    assert 0.001 < few < many < most
    assert most > 0.2


@pytest.mark.parametrize("h", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("strategy", ["ffa-lora", "rolora", "fedsvd", "flora", "fedex-lora"])
def test_exact_strategies_have_no_cross_term(strategy, h):
    """A and B in turn, B alone, or the rest of the mean in the base."""
    assert max(run(strategy, targets(h, 0)[1]).cross_terms) < 1e-6


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("h", [0.0, 1.0, 2.0])
def test_rolora_finds_the_answer_where_ffa_stays_at_its_floor(h, seed):
    """r = rank of the answer, 40 rounds of 20 steps at rate 0.05."""
    common, goals = targets(h, seed)
    rolora, ffa = (run(name, goals, seed=seed) for name in ("rolora", "ffa-lora"))
    lowest = floor(common, start(seed=seed).tensors[A])
    assert relative_error(rolora, common) < 0.01
    assert 0.8 < lowest <= relative_error(ffa, common) + 1e-6
    assert relative_error(ffa, common) < lowest + 0.02


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("strategy", ["lora-fair", "fedex-lora"])
def test_without_a_cross_term_there_is_nothing_to_correct(strategy, seed):
    """h = 0: the whole trajectory is FedIT's."""
    goals = targets(0.0, seed)[1]
    found, fedit = (run(name, goals, seed=seed).products for name in (strategy, "fedit"))
    assert max(float((x - y).abs().max()) for x, y in zip(found, fedit, strict=True)) < 1e-8


@pytest.mark.parametrize("seed", SEEDS)
def test_the_rank_of_flora_grows_beyond_that_of_its_adapter(seed):
    """An answer of rank 8, adapters of rank 4: below the floor of every matrix of rank 4."""
    common, goals = targets(0.0, seed, rank=8)
    sigma = torch.linalg.svdvals(common)
    best = float(sigma[4:].norm() / sigma.norm())
    trace = run("flora", goals, seed=seed)
    assert relative_error(trace, common) < best / 2
    assert torch.linalg.matrix_rank(trace.products[-1], rtol=1e-3) > 4


@pytest.mark.parametrize("seed", SEEDS)
def test_exactness_of_the_mean_is_not_optimality(seed):
    """Clients that fit their own answers: FedEx-LoRA is exact in every round, and moves away
    from the common answer, where FedIT stays.
    """
    common, goals = targets(1.0, seed)
    trace = run("fedex-lora", goals, seed=seed)
    errors = [float((product - common).norm() / common.norm()) for product in trace.products]
    assert max(trace.cross_terms) < 1e-6
    assert errors[9] < errors[19] < errors[39]
    assert relative_error(run("fedit", goals, seed=seed), common) < errors[39] / 3
    # a part of the residual moves less
    half = run("fedex-lora", goals, seed=seed, options={"residual_scale": 0.1})
    assert relative_error(half, common) < errors[39] / 2


@pytest.mark.parametrize("seed", SEEDS)
def test_fedsvd_has_the_floor_of_ffa_and_is_there_sooner(seed):
    """Re-factorising never enlarges the row space; orthonormal rows only condition it."""
    common, goals = targets(1.0, seed)
    lowest = floor(common, start(seed=seed).tensors[A])
    few, ffa = (run(name, goals, seed=seed, rounds=3) for name in ("fedsvd", "ffa-lora"))
    assert lowest - 1e-6 < relative_error(few, common) < relative_error(ffa, common)
    limit = run("fedsvd", goals, seed=seed, rounds=6, steps=100, rate=0.5)
    assert abs(relative_error(limit, common) - lowest) < 1e-5


def test_lora_fair_is_nearer_than_fedit_for_most_answers():
    """h = 2, 20 steps: in the median of 12, not in each of them."""
    gains = []
    for seed in range(12):
        common, goals = targets(2.0, seed)
        fair, fedit = (
            relative_error(run(name, goals, seed=seed), common) for name in ("lora-fair", "fedit")
        )
        gains.append(fedit - fair)
    assert statistics.median(gains) > 0.001


@pytest.mark.parametrize("seed", SEEDS)
def test_heterogeneous_clients_order_the_strategies(seed):
    """h = 2, 20 steps: RoLoRA < FlexLoRA < FedIT < FFA-LoRA, and FedIT worse than at h = 1."""
    common, goals = targets(2.0, seed)
    rolora, flexlora, fedit, ffa = (
        relative_error(run(name, goals, seed=seed), common)
        for name in ("rolora", "flexlora", "fedit", "ffa-lora")
    )
    assert rolora < flexlora < fedit < ffa
    assert fedit > 0.1
    middle, goals = targets(1.0, seed)
    assert 0.05 < relative_error(run("fedit", goals, seed=seed), middle) < fedit


@pytest.mark.parametrize(
    "strategy",
    ["fedit", "ffa-lora", "rolora", "flexlora", "lora-fair", "fedsvd", "fedex-lora"],
)
def test_no_strategy_of_one_rank_beats_the_best_matrix_of_it(strategy):
    """Eckart and Young: an answer of rank 8 leaves a rank-4 adapter its last singular values."""
    common, goals = targets(0.0, 3, rank=8)
    sigma = torch.linalg.svdvals(common)
    best = float(sigma[4:].norm() / sigma.norm())
    assert relative_error(run(strategy, goals, seed=3), common) > best - 1e-6


@pytest.mark.parametrize("rank", [1, 4, 8])
def test_ffa_converges_to_what_its_frozen_factor_can_reach(rank):
    """|W (I - Pi_A)| to 1e-6, with the rate 1 / largest eigenvalue of A A^T."""
    common, goals = targets(1.0, 4)
    a0 = start(rank, seed=4).tensors[A].double()
    rate = 1.0 / float(torch.linalg.matrix_norm(a0, 2)) ** 2
    trace = run("ffa-lora", goals, rounds=4, steps=300, rate=rate, rank=rank, seed=4, exact=True)
    assert abs(relative_error(trace, common) - floor(common, a0)) < 1e-6


@pytest.mark.parametrize("scale", [0.25, 4.0])
def test_the_scale_of_ffa_is_a_learning_rate(scale):
    """Gradient descent with (s, rate) moves the product as with (1, s^2 rate)."""
    _, goals = targets(1.0, 5)
    scaled = run("ffa-lora", goals, rounds=5, rate=0.01, scale=scale, exact=True)
    plain = run("ffa-lora", goals, rounds=5, rate=0.01 * scale**2, exact=True)
    for left, right in zip(scaled.products, plain.products, strict=True):
        assert (left - right).abs().max() < 1e-10
    assert right.norm() > 0.01


def test_the_scale_of_lora_is_not():
    _, goals = targets(1.0, 5)
    scaled = run("fedit", goals, rounds=5, rate=0.01, scale=4.0, exact=True)
    plain = run("fedit", goals, rounds=5, rate=0.16, exact=True)
    assert (scaled.products[-1] - plain.products[-1]).norm() > 1e-3


def test_one_local_step_from_zero_leaves_the_other_factor():
    """With B = 0 the gradient s B^T G of A is zero, so the first one-step round is exact."""
    trace = run("fedit", targets(2.0, 6)[1], rounds=1, steps=1)
    assert trace.cross_terms[0] < 1e-6


def test_the_order_of_the_ranks_of_one_client_matters_to_fedit():
    """Same product, permuted slots: factor averaging is not a function of the product."""
    b, a = gauss(32, 4, seed=1), gauss(4, 24, seed=2)
    mean_b = (b + b[:, [1, 2, 3, 0]]) / 2
    mean_a = (a + a[[1, 2, 3, 0]]) / 2
    assert (mean_b @ mean_a - b @ a).norm() / (b @ a).norm() > 0.1
