"""LoRA-LEGO's merge, https://arxiv.org/abs/2409.16167, against dense float64 sums."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedlora.seeds import generator
from fedlora.strategies.rank_clustering import fill_empty, k_means, merge_units

D, K_IN = 9, 7
MODES = ("mass", "paper")


def lora(rank, seed, scale=1.0):
    draws = torch.Generator().manual_seed(seed)
    b = torch.randn(D, rank, generator=draws, dtype=torch.float64)
    a = torch.randn(rank, K_IN, generator=draws, dtype=torch.float64)
    return scale * b, a


def merge(pairs, weights, clusters, seed=0, **options):
    return merge_units(pairs, weights, clusters, generator=generator(seed, "test"), **options)


def dense(pair):
    return pair[0] @ pair[1]


def close(found, expected, tol=1e-10):
    torch.testing.assert_close(found, expected, rtol=0, atol=tol * float(expected.norm() + 1e-300))


def permuted(pair, seed):
    order = torch.randperm(pair[1].shape[0], generator=torch.Generator().manual_seed(seed))
    return pair[0][:, order], pair[1][order]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rank", [1, 4, 6])
def test_permuted_copies_merge_into_the_one_lora(mode, rank):
    """Averaging the factors of the same copies is far off."""
    one = lora(rank, 1, scale=2.0)
    copies = [permuted(one, seed) for seed in range(5)]
    b, a = merge(copies, [0.1, 0.2, 0.3, 0.15, 0.25], rank, mode=mode)
    assert (b.shape, a.shape) == ((D, rank), (rank, K_IN))
    close(b @ a, dense(one))
    if rank > 1:
        mean_b = sum(c[0] for c in copies) / 5
        mean_a = sum(c[1] for c in copies) / 5
        assert (mean_b @ mean_a - dense(one)).norm() > 0.3 * dense(one).norm()


@pytest.mark.parametrize("balance", [True, False])
def test_as_many_clusters_as_units_give_the_sum_or_the_weighted_sum(balance):
    pairs = [lora(2, 1, 0.5), lora(4, 2, 2.0), lora(3, 3, 1e-3)]
    weights = [0.5, 0.2, 0.3]
    b, a = merge(pairs, weights, 9, mode="paper", output_reweight=False, balance=balance)
    close(b @ a, sum(map(dense, pairs)))
    b, a = merge(pairs, weights, 9, mode="mass", balance=balance)
    close(b @ a, sum(w * dense(p) for w, p in zip(weights, pairs, strict=True)))


def test_output_reweighting_is_the_root_of_mean_rank_over_clusters():
    pairs = [lora(2, 1), lora(4, 2), lora(3, 3)]
    b, a = merge(pairs, [1, 1, 1], 9, mode="paper")
    close(b @ a, math.sqrt(3 / 9) * sum(map(dense, pairs)))


@pytest.mark.parametrize("mode", MODES)
@given(seed=st.integers(0, 99), clusters=st.integers(1, 9))
def test_the_order_of_units_inside_a_lora_does_not_matter(mode, seed, clusters):
    pairs = [lora(2, 1), lora(4, 2), lora(3, 3)]
    shuffled = [permuted(pair, seed + i) for i, pair in enumerate(pairs)]
    found = dense(merge(shuffled, [1, 2, 1], clusters, mode=mode))
    close(found, dense(merge(pairs, [1, 2, 1], clusters, mode=mode)))


@pytest.mark.parametrize("mode", MODES)
def test_unequal_ranks_and_heaviest_slots_first(mode):
    b, a = merge([lora(2, 1), lora(4, 2), lora(3, 3)], [0.2, 0.5, 0.3], 4, mode=mode)
    assert (b.shape, a.shape, b.dtype, a.dtype) == (
        (D, 4),
        (4, K_IN),
        torch.float64,
        torch.float64,
    )
    size = b.norm(dim=0) * a.norm(dim=1)
    assert bool((size[:-1] >= size[1:]).all())


def balanced_points(pairs):
    points = []
    for left, right in pairs:
        for b, a in zip(left.T, right, strict=True):
            ratio = (b.norm() / a.norm()).sqrt()
            points.append(torch.cat([a * ratio, b / ratio]))
    return torch.stack(points)


@pytest.mark.parametrize("clusters", [2, 3, 4])
def test_the_best_division_of_few_units_is_found_and_its_lengths_kept(clusters):
    """Against every division of five units, written out, with signs aligned by brute force."""
    pairs = [lora(2, 11), lora(1, 12), lora(2, 13)]
    points = balanced_points(pairs)
    best, centroids = math.inf, []
    for labels in itertools.product(range(clusters), repeat=5):
        for signs in itertools.product((1, -1), repeat=4):
            signed = points * torch.tensor((1, *signs), dtype=torch.float64)[:, None]
            groups = [signed[[i for i in range(5) if labels[i] == c]] for c in range(clusters)]
            if any(len(g) == 0 for g in groups):
                continue
            cost = sum(float(((g - g.mean(0)) ** 2).sum()) for g in groups)
            if cost < best - 1e-12:
                best = cost
                centroids = [g.mean(0) * g.norm(dim=1).mean() / g.mean(0).norm() for g in groups]
    b, a = merge(pairs, [1, 1, 1], clusters, mode="paper", output_reweight=False, n_init=50)
    expected = sum(torch.outer(c[K_IN:], c[:K_IN]) for c in centroids)
    close(b @ a, expected)
    found = torch.cat([a, b.T], dim=1).norm(dim=1).sort().values
    close(found, torch.stack([c.norm() for c in centroids]).sort().values)


def test_without_reweighting_a_centroid_is_the_weighted_mean():
    pairs = [lora(1, 1), lora(1, 2)]
    points = balanced_points(pairs)
    for align in (True, False):
        sign = -1.0 if align and float(points[0] @ points[1]) < 0 else 1.0
        mean = 0.75 * points[0] + 0.25 * sign * points[1]
        options = {"sign_align": align, "param_reweight": False}
        b, a = merge(pairs, [3, 1], 1, mode="mass", **options)
        # masses are the weights as they are given: 4
        close(b @ a, 4 * torch.outer(mean[K_IN:], mean[:K_IN]))


@pytest.mark.parametrize("mode", MODES)
def test_a_unit_and_its_negative_are_one_unit(mode):
    b, a = lora(4, 1)
    pairs = [(b, a), (-b, -a)]
    close(dense(merge(pairs, [0.5, 0.5], 4, mode=mode)), b @ a)
    unaligned = dense(merge(pairs, [0.5, 0.5], 4, mode=mode, sign_align=False))
    assert (unaligned - b @ a).norm() > 0.1 * (b @ a).norm()


@given(
    seed=st.integers(0, 10_000),
    points=st.integers(1, 30),
    clusters=st.integers(1, 35),
    signed=st.booleans(),
)
def test_inertia_never_rises_and_is_the_sum_of_squared_distances(seed, points, clusters, signed):
    draws = torch.Generator().manual_seed(seed)
    x = torch.randn(points, 4, generator=draws, dtype=torch.float64)
    w = torch.rand(points, generator=draws, dtype=torch.float64) + 0.1
    runs = [
        k_means(x @ x.T, w, clusters, signed=signed, max_iter=50, generator=generator(seed, "k"))
        for _ in range(2)
    ]
    found = runs[0]
    assert torch.equal(found.labels, runs[1].labels)
    assert found.inertias == runs[1].inertias
    scale = float((w * (x**2).sum(1)).sum())
    for before, after in itertools.pairwise(found.inertias):
        assert after <= before + 1e-12 * scale
    assert signed or bool((found.signs == 1).all())
    total = 0.0
    for label in found.labels.unique():
        members = (found.labels == label).nonzero()[:, 0]
        own, weight = x[members] * found.signs[members, None], w[members, None]
        centroid = (weight * own).sum(0) / weight.sum()
        total += float((weight * (own - centroid) ** 2).sum())
    assert found.inertias[-1] == pytest.approx(total, abs=1e-12 * scale)
    # every cluster has members as long as there are points enough
    assert len(found.labels.unique()) == min(points, clusters)


def test_well_separated_groups_are_found():
    draws = torch.Generator().manual_seed(0)
    centres = 10 * torch.eye(5, dtype=torch.float64)
    truth = torch.arange(40) % 5
    signs = torch.where(torch.rand(40, generator=draws) < 0.5, -1.0, 1.0)
    noise = 0.1 * torch.randn(40, 5, generator=draws, dtype=torch.float64)
    x = signs[:, None] * (centres[truth] + noise)
    gram, w = x @ x.T, torch.ones(40, dtype=torch.float64)
    found = k_means(gram, w, 5, signed=True, max_iter=50, generator=generator(0, "k"))
    together = found.labels[:, None] == found.labels
    assert torch.equal(together, truth[:, None] == truth)
    relative = found.signs[:, None] * found.signs
    assert torch.equal(relative[together], (signs[:, None] * signs)[together].to(relative))


def test_an_empty_cluster_takes_the_point_that_costs_most():
    """Clusters 1 and 3 are empty; point 4 is farther than 2 but alone, point 0 is heavier."""
    labels = torch.tensor([0, 0, 0, 0, 2])
    own = torch.tensor([2.0, 1.0, 3.0, 0.0, 9.0], dtype=torch.float64)
    distances = torch.zeros(5, 4, dtype=torch.float64)
    distances[torch.arange(5), labels] = own
    weights = torch.tensor([2.0, 1, 1, 1, 1], dtype=torch.float64)
    found = fill_empty(labels.clone(), distances, weights, 4)
    assert found.tolist() == [1, 0, 3, 0, 2]
    # a point at its centroid gains nothing by a cluster of its own
    assert fill_empty(labels.clone(), torch.zeros(5, 4), weights, 4).tolist() == [0, 0, 0, 0, 2]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("clusters", [3, 5, 12, 40])
def test_more_clusters_than_distinct_units(mode, clusters):
    one = lora(3, 1)
    b, a = merge([one, permuted(one, 1)], [1, 1], clusters, mode=mode, output_reweight=False)
    assert (b.shape, a.shape) == ((D, clusters), (clusters, K_IN))
    # mass 1 per LoRA: the sum; plain centroids: the LoRA itself
    close(b @ a, dense(one) * (2 if mode == "mass" else 1))
    assert bool((b[:, 3:] == 0).all())
    assert bool((a[3:] == 0).all())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("reweight", [True, False])
def test_members_that_cancel_leave_a_zero_slot(mode, reweight):
    b, a = lora(1, 1)
    options = {"sign_align": False, "param_reweight": reweight}
    found = merge([(b, a), (-b, -a)], [1, 1], 1, mode=mode, **options)
    assert bool((found[0] == 0).all())
    assert bool((found[1] == 0).all())


@given(seed=st.integers(0, 200))
def test_rounding_left_by_members_that_cancel_is_not_blown_up(seed):
    """Three units whose sum is zero but for rounding."""
    first, second = lora(1, seed), lora(1, seed + 1000)
    third = (-first[0] - second[0], -first[1] - second[1])
    options = {"sign_align": False, "balance": False}
    b, a = merge([first, second, third], [1, 1, 1], 1, mode="paper", **options)
    assert float((b @ a).norm()) == 0.0


@pytest.mark.parametrize("mode", MODES)
def test_zero_loras_give_zero(mode):
    b, a = lora(3, 1)
    for pairs in ([(0 * b, a)], [(0 * b, 0 * a), (0 * b, a)]):
        found = merge(pairs, [1] * len(pairs), 2, mode=mode)
        assert bool((found[0] == 0).all())
        assert bool((found[1] == 0).all())


def test_negligible_units_take_no_cluster():
    b, a = lora(2, 1)
    small_b, small_a = lora(6, 2, scale=1e-12)
    found = merge([(b, a), (small_b, small_a)], [1, 1], 2)
    close(dense(found), b @ a)


@pytest.mark.parametrize("mode", MODES)
def test_a_lora_of_weight_zero_changes_nothing(mode):
    pairs = [lora(2, 1), lora(4, 2)]
    found = merge([*pairs, lora(8, 3)], [1, 2, 0], 3, mode=mode)
    close(dense(found), dense(merge(pairs, [1, 2], 3, mode=mode)))


def test_balancing_makes_the_split_of_a_unit_irrelevant():
    pairs = [lora(3, 1), lora(3, 2)]
    resplit = [(1e-3 * b, 1e3 * a) for b, a in pairs]
    close(dense(merge(resplit, [1, 1], 4)), dense(merge(pairs, [1, 1], 4)))
    free = dense(merge(resplit, [1, 1], 4, balance=False))
    assert (free - dense(merge(pairs, [1, 1], 4, balance=False))).norm() > 1e-3


def test_the_same_seed_gives_the_same_bits():
    pairs = [lora(6, seed) for seed in range(4)]
    one, two = (merge(pairs, [1] * 4, 6, seed=5) for _ in range(2))
    assert torch.equal(one[0], two[0])
    assert torch.equal(one[1], two[1])
