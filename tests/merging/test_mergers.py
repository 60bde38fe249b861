"""Each merger against dense float64 sums of s_i B_i A_i, the papers' formulas written out."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.errors import ConfigError
from fedlora.merging import MERGERS, Given
from fedlora.merging.dare import Dare
from fedlora.merging.dense import ROWS, magnitude_threshold, row_blocks, to_lora
from fedlora.merging.fedex_lora import FedExLora
from fedlora.merging.flexlora import FlexLora
from fedlora.merging.lora_lego import LoraLego
from fedlora.merging.options import make_merger
from fedlora.merging.regmean import RegMean, regression_mean
from fedlora.merging.task_arithmetic import TaskArithmetic
from fedlora.merging.ties import Ties, disjoint_mean

SHAPES = {"first": (12, 9), "second": (9, 14)}
RANKS = (2, 4, 3)
SCALES = (2.0, 0.5, 1.0)
WEIGHTS = (0.5, 0.2, 0.3)
# what the two equal: a rank that keeps everything
LINEAR = ("task-arithmetic", "flora", "fedex-lora")


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def adapters(ranks=RANKS, scales=SCALES):
    """Layer -> changes; the scale is in L, as the reader of folders leaves it."""
    return {
        name: tuple(
            (s * draw(d, r, seed=10 * i + j), draw(r, k, seed=100 + 10 * i + j))
            for i, (r, s) in enumerate(zip(ranks, scales, strict=True))
        )
        for j, (name, (d, k)) in enumerate(SHAPES.items())
    }


def task(weights=WEIGHTS, rank=None, seed=0, layers=None, grams=None):
    return Given(layers or adapters(), weights, rank, seed, grams or {})


def dense(pair):
    return pair[0] @ pair[1]


def mean(changes, weights=WEIGHTS):
    return sum(w * dense(c) for w, c in zip(weights, changes, strict=True))


def close(found, expected, tol=1e-10):
    torch.testing.assert_close(found, expected, rtol=0, atol=tol * float(expected.norm() + 1e-300))


def gram(k, seed, tokens=40):
    x = draw(tokens, k, seed=seed)
    return x.T @ x / tokens


def grams():
    return {
        name: tuple(gram(k, 200 + 10 * j + i) for i in range(3))
        for j, (name, (_, k)) in enumerate(SHAPES.items())
    }


@pytest.mark.parametrize("name", LINEAR)
def test_linear_mergers_give_the_exact_weighted_mean(name):
    """Unequal ranks and scales; task arithmetic of lambda 1/n on the plain sum is the mean."""
    found = MERGERS[name]().merge(task())
    for layer, changes in adapters().items():
        close(dense(found[layer]), mean(changes))
        if name == "fedex-lora":
            # unequal ranks leave a residual of rank up to R + r
            assert found[layer][1].shape[0] <= sum(RANKS) + max(RANKS)
        else:
            assert found[layer][1].shape[0] == sum(RANKS)


def test_task_arithmetic_scales_the_sum():
    found = TaskArithmetic(scaling=3.0).merge(task(weights=(1 / 3, 1 / 3, 1 / 3)))
    for layer, changes in adapters().items():
        close(dense(found[layer]), sum(map(dense, changes)))


def best(matrix, rank):
    u, sigma, vh = torch.linalg.svd(matrix)
    return (u[:, :rank] * sigma[:rank]) @ vh[:rank]


@pytest.mark.parametrize("name", ["task-arithmetic", "flora", "flexlora"])
@pytest.mark.parametrize("rank", [1, 4, 8])
def test_with_a_rank_the_mean_is_approximated_best(name, rank):
    """Eckart-Young: the dense SVD, cut."""
    found = MERGERS[name]().merge(task(rank=rank))
    for layer, changes in adapters().items():
        assert found[layer][1].shape[0] == rank
        close(dense(found[layer]), best(mean(changes), rank))


def test_flexlora_has_the_largest_rank_by_default():
    found = FlexLora().merge(task())
    for layer, changes in adapters().items():
        assert found[layer][1].shape[0] == 4
        close(dense(found[layer]), best(mean(changes), 4))


def test_fedex_keeps_the_mean_factors_in_front():
    layers = adapters(ranks=(3, 3, 3))
    for rank in (None, 3, 5):
        found = FedExLora().merge(task(layers=layers, rank=rank))
        for name, changes in layers.items():
            b = sum(w * c[0] for w, c in zip(WEIGHTS, changes, strict=True))
            a = sum(w * c[1] for w, c in zip(WEIGHTS, changes, strict=True))
            close(found[name][0][:, :3], b)
            close(found[name][1][:3], a)
            residual = mean(changes) - b @ a
            expected = residual if rank is None else best(residual, rank - 3)
            close(dense(found[name]) - b @ a, expected)
            # the residual's rank is at most (n - 1) r
            assert found[name][1].shape[0] == (9 if rank is None else rank)


def test_fedex_of_a_shared_factor_needs_no_residual():
    a = draw(3, 9, seed=1)
    layers = {"first": tuple((draw(12, 3, seed=i), a) for i in range(3))}
    found = FedExLora().merge(task(layers=layers))["first"]
    assert found[1].shape[0] == 3
    close(dense(found), mean(layers["first"]))


def test_fedex_refuses_a_rank_below_its_mean_factors():
    with pytest.raises(ConfigError, match="at least that, or choose flexlora"):
        FedExLora().merge(task(rank=3))


def test_lego_of_all_units_is_the_mean_and_by_default_has_the_largest_rank():
    found = LoraLego().merge(task(rank=9))
    for layer, changes in adapters().items():
        close(dense(found[layer]), mean(changes))
    found = LoraLego().merge(task())
    assert {pair[1].shape[0] for pair in found.values()} == {4}


def test_lego_of_permuted_copies_is_the_one():
    b, a = draw(12, 4, seed=1), draw(4, 9, seed=2)
    copies = tuple((b[:, order], a[order]) for order in (torch.randperm(4) for _ in range(3)))
    found = LoraLego().merge(task(layers={"first": copies}))["first"]
    close(dense(found), b @ a)


def test_lego_in_paper_mode_is_the_scaled_sum():
    found = LoraLego(mode="paper").merge(task(rank=9))
    for layer, changes in adapters().items():
        close(dense(found[layer]), math.sqrt(3 / 9) * sum(map(dense, changes)))


def ties_reference(density, scaling, weights=WEIGHTS):
    """Flat vectors of whole models, sorted; the paper's three steps entry by entry."""
    layers = adapters()
    flat = [
        torch.cat([dense(changes[i]).flatten() for changes in layers.values()])
        for i in range(len(weights))
    ]
    keep = round(density * len(flat[0]))
    trimmed = []
    for vector in flat:
        largest = vector.abs().argsort(descending=True)[:keep]
        trimmed.append(torch.zeros_like(vector).index_put((largest,), vector[largest]))
    merged = torch.zeros_like(flat[0])
    for entry in range(len(merged)):
        values = [(w, float(t[entry])) for w, t in zip(weights, trimmed, strict=True)]
        total = sum(w * v for w, v in values)
        agree = [(w, v) for w, v in values if v * total > 0]
        if agree:
            merged[entry] = scaling * sum(w * v for w, v in agree) / sum(w for w, _ in agree)
    sizes = [d * k for d, k in SHAPES.values()]
    parts = merged.split(sizes)
    return {n: p.reshape(SHAPES[n]) for n, p in zip(SHAPES, parts, strict=True)}


@pytest.mark.parametrize("density", [0.05, 0.2, 0.7, 1.0])
def test_ties_is_the_papers_three_steps(density):
    found = Ties(density=density, scaling=0.7).merge(task())
    for layer, expected in ties_reference(density, 0.7).items():
        close(dense(found[layer]), expected)


@pytest.mark.parametrize("rank", [1, 3])
def test_ties_with_a_rank_is_cut_by_the_svd(rank):
    found = Ties().merge(task(rank=rank))
    for layer, expected in ties_reference(0.2, 1.0).items():
        assert found[layer][1].shape[0] == rank
        close(dense(found[layer]), best(expected, rank))


def test_ties_of_one_adapter_at_full_density_is_itself():
    layers = {name: changes[:1] for name, changes in adapters().items()}
    found = Ties(density=1.0).merge(task(weights=(1.0,), layers=layers))
    for name, (change,) in layers.items():
        close(dense(found[name]), dense(change))
        assert found[name][1].shape[0] == 2


def test_ties_of_opposites_is_zero():
    """A tie elects nobody."""
    layers = {n: (c[0], (-c[0][0], c[0][1])) for n, c in adapters().items()}
    for density in (0.2, 1.0):
        found = Ties(density=density).merge(task(weights=(0.5, 0.5), layers=layers))
        assert all(bool((dense(pair) == 0).all()) for pair in found.values())
    # of unequal weight the heavier one wins, whole
    found = Ties(density=1.0).merge(task(weights=(0.6, 0.4), layers=layers))
    for name, changes in layers.items():
        close(dense(found[name]), dense(changes[0]))


def test_disjoint_mean_by_hand():
    values = torch.tensor([[1.0, 1, -2, 0, 3], [3.0, -5, -4, 0, 0], [-1.0, 1, 1, 0, 1]])
    expected = torch.tensor([2.0, -5.0, -3.0, 0.0, 2.0])
    assert torch.equal(disjoint_mean(values, torch.full((3, 1), 1.0)), expected)


@given(
    seed=st.integers(0, 999),
    fraction=st.floats(0.001, 1.0),
    decimals=st.sampled_from([1, 2, 9]),
    exponent=st.sampled_from([-20, 0, 20]),
)
def test_the_threshold_is_the_order_statistic(seed, fraction, decimals, exponent):
    """Against a full sort, with many equal entries where decimals are few."""
    changes = []
    for i, (d, k) in enumerate(SHAPES.values()):
        values = torch.round(draw(d, k, seed=seed + i), decimals=decimals) * 10.0**exponent
        changes.append((values, torch.eye(k, dtype=torch.float64)))
    magnitudes = torch.cat([left.flatten() for left, _ in changes]).float().abs()
    keep = max(1, round(fraction * len(magnitudes)))
    expected = magnitudes.sort(descending=True).values[keep - 1]
    assert float(magnitude_threshold(changes, fraction)) == float(expected)


def test_rows_come_in_blocks_that_make_up_the_layer():
    change = draw(2 * ROWS + 3, 2, seed=1), draw(2, 5, seed=2)
    blocks = [block for (block,) in row_blocks([change])]
    assert [len(block) for block in blocks] == [ROWS, ROWS, 3]
    close(torch.cat(blocks), dense(change))
    expected = dense(change).float().abs().flatten().sort(descending=True).values[99]
    found = magnitude_threshold([change], 100 / dense(change).numel())
    assert float(found) == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("shape", [(30, 40), (40, 30)])
@pytest.mark.parametrize("rank", [1, 5, 30])
@pytest.mark.parametrize("decay", [0.0, 0.5, 1.0])
def test_a_cut_is_as_good_as_that_of_the_svd(shape, rank, decay):
    """Spectra flat and falling to 1e-9 of the largest: the error is Eckart and Young's."""
    u, _, vh = torch.linalg.svd(draw(*shape), full_matrices=False)
    sigma = torch.exp(-decay * 0.7 * torch.arange(30, dtype=torch.float64))
    change = (u * sigma) @ vh
    b, a = to_lora(change, rank)
    assert (b.shape, a.shape) == ((shape[0], rank), (rank, shape[1]))
    least = float((sigma[rank:] ** 2).sum())
    assert float((b @ a - change).norm()) == pytest.approx(least**0.5, rel=1e-6, abs=1e-8)
    torch.testing.assert_close(b.norm(dim=0), a.norm(dim=1))


def test_a_dense_change_becomes_a_lora_without_loss():
    for shape in ((5, 8), (8, 5)):
        change = draw(*shape)
        b, a = to_lora(change, None)
        assert a.shape[0] == 5
        close(b @ a, change)
    b, a = to_lora(torch.zeros(5, 8, dtype=torch.float64), None)
    assert (b.shape, a.shape) == ((5, 1), (1, 8))
    assert bool((b @ a == 0).all())


def test_dare_is_unbiased():
    """The mean over seeds is within three standard errors of task arithmetic, per entry.

    Of 234 entries 0.27% may be farther by chance; 4.5 errors none (one in 600 runs of another
    seed; the seeds are fixed).
    """
    seeds = 1500
    sums = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in SHAPES.items()}
    squares = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in SHAPES.items()}
    merger = Dare(drop=0.4, scaling=0.8)
    for seed in range(seeds):
        for name, pair in merger.merge(task(seed=seed)).items():
            sums[name] += dense(pair)
            squares[name] += dense(pair) ** 2
    outside = entries = 0
    for name, changes in adapters().items():
        average = sums[name] / seeds
        error = ((squares[name] / seeds - average**2) / seeds).sqrt()
        off = (average - 0.8 * mean(changes)).abs() / error
        assert float(off.max()) < 4.5
        outside += int((off > 3).sum())
        entries += off.numel()
        # variance of one: p / (1 - p) times the sum of squares of the weighted changes
        spread = sum((0.8 * w * dense(c)) ** 2 for w, c in zip(WEIGHTS, changes, strict=True))
        close(error**2 * seeds, 0.4 / 0.6 * spread, tol=0.2)
    assert outside <= 0.02 * entries


def test_dare_without_drop_is_task_arithmetic_and_a_seed_is_a_seed():
    for layer, pair in Dare(drop=0.0).merge(task()).items():
        close(dense(pair), mean(adapters()[layer]))
    one, same, other = (Dare().merge(task(seed=s))["first"] for s in (1, 1, 2))
    assert torch.equal(one[0], same[0])
    assert not torch.equal(dense(one), dense(other))


def test_dare_drops_entries_of_the_product():
    """One adapter, rescaled: each entry is gone or doubled."""
    layers = {name: changes[:1] for name, changes in adapters().items()}
    found = Dare(drop=0.5).merge(task(weights=(1.0,), layers=layers))
    for name, (change,) in layers.items():
        ratio = dense(found[name]) / dense(change)
        kept = ratio > 1
        close(ratio, 2.0 * kept.double(), tol=1e-8)
        assert 0.25 < float(kept.double().mean()) < 0.75


def test_regmean_of_equal_grams_is_the_mean():
    """Also of singular ones: five tokens span no more than five dimensions."""
    for tokens in (40, 5):
        equal = {n: (gram(k, 1, tokens),) * 3 for n, (_, k) in SHAPES.items()}
        for option in (0.95, 1.0):
            found = RegMean(off_diagonal=option).merge(task(grams=equal))
            for layer, changes in adapters().items():
                close(dense(found[layer]), mean(changes))
                assert found[layer][1].shape[0] == sum(RANKS)


@pytest.mark.parametrize("tokens", [40, 4])
@pytest.mark.parametrize("off_diagonal", [0.0, 0.95, 1.0])
def test_regmean_is_the_minimiser(off_diagonal, tokens):
    """Sum_i w_i (dW - dW_i) G_i = 0, with the Grams shrunk; four tokens leave directions free."""
    given_grams = {
        n: tuple(gram(k, 7 * i + k, tokens) for i in range(3)) for n, (_, k) in SHAPES.items()
    }
    found = RegMean(off_diagonal=off_diagonal).merge(task(grams=given_grams))
    for layer, changes in adapters().items():
        shrunk = []
        for g in given_grams[layer]:
            copy = g * off_diagonal
            copy.diagonal().copy_(g.diagonal())
            shrunk.append(copy)
        slope = sum(
            w * (dense(found[layer]) - dense(c)) @ g
            for w, c, g in zip(WEIGHTS, changes, shrunk, strict=True)
        )
        scale = sum(
            w * (dense(c) @ g).norm() for w, c, g in zip(WEIGHTS, changes, shrunk, strict=True)
        )
        assert float(slope.norm()) < 1e-9 * float(scale)
        if tokens == 40:
            total = sum(w * g for w, g in zip(WEIGHTS, shrunk, strict=True))
            each = zip(WEIGHTS, changes, shrunk, strict=True)
            close(dense(found[layer]), sum(w * dense(c) @ g for w, c, g in each) @ total.inverse())


def test_regmean_where_no_input_goes_is_the_mean():
    """Inputs in the first five coordinates only; the other columns of dW are not seen."""
    (d, k), changes = SHAPES["first"], adapters()["first"]
    seen = torch.zeros(k, k, dtype=torch.float64)
    seen[:5, :5] = torch.eye(5, dtype=torch.float64)
    grams_ = [seen @ gram(k, i) @ seen for i in range(3)]
    merged = dense(regression_mean(changes, WEIGHTS, grams_))
    close(merged[:, 5:], mean(changes)[:, 5:])
    assert (merged[:, :5] - mean(changes)[:, :5]).norm() > 0.1
    assert d == len(merged)


def test_regmean_reproduces_each_adapter_on_its_own_inputs_where_they_do_not_overlap():
    """Two adapters, inputs in complementary subspaces: no compromise is needed."""
    changes = adapters()["first"][:2]
    halves = torch.eye(9, dtype=torch.float64)
    first, second = halves[:, :4], halves[:, 4:]
    merged = dense(regression_mean(changes, (0.5, 0.5), [first @ first.T, second @ second.T]))
    close(merged @ first, dense(changes[0]) @ first)
    close(merged @ second, dense(changes[1]) @ second)


@pytest.mark.parametrize("name", MERGERS)
def test_one_adapter_with_all_the_weight(name):
    """Of methods that keep everything, the adapter itself."""
    layers = {n: c[:1] for n, c in adapters().items()}
    some = {n: g[:1] for n, g in grams().items()}
    options = {"ties": {"density": 1.0}, "dare": {"drop": 0.0}}.get(name, {})
    found = make_merger(name, options).merge(task(weights=(1.0,), layers=layers, grams=some))
    for layer, (change,) in layers.items():
        close(dense(found[layer]), dense(change))


@pytest.mark.parametrize("name", MERGERS)
@settings(max_examples=15)
@given(rank=st.one_of(st.none(), st.integers(1, 9)), zero=st.booleans())
def test_shapes_ranks_and_finite_numbers(name, rank, zero):
    """Also of adapters whose change is still zero, as before the first step of training."""
    layers = adapters()
    if zero:
        layers = {n: tuple((0 * b, a) for b, a in c) for n, c in layers.items()}
    if name == "fedex-lora" and rank is not None:
        rank = max(rank, 4)
    found = make_merger(name, {}).merge(task(layers=layers, rank=rank, grams=grams()))
    assert found.keys() == SHAPES.keys()
    for layer, (b, a) in found.items():
        assert (b.shape[0], a.shape[1]) == SHAPES[layer]
        assert b.shape[1] == a.shape[0] >= 1
        assert b.dtype == a.dtype == torch.float64
        assert bool(torch.isfinite(b).all())
        assert bool(torch.isfinite(a).all())
        assert rank is None or a.shape[0] <= rank
        if zero:
            assert float(dense((b, a)).abs().max()) == 0.0


@pytest.mark.parametrize("name", sorted(set(MERGERS) - {"ties", "dare", "lora-lego"}))
def test_the_order_of_adapters_does_not_matter(name):
    back = {n: c[::-1] for n, c in adapters().items()}
    back_grams = {n: g[::-1] for n, g in grams().items()}
    one = make_merger(name, {}).merge(task(grams=grams()))
    two = make_merger(name, {}).merge(task(weights=WEIGHTS[::-1], layers=back, grams=back_grams))
    for layer in SHAPES:
        close(dense(one[layer]), dense(two[layer]))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("tise", {}, 'did you mean "ties"'),
        ("linear", {}, "known: task-arithmetic, ties"),
        ("ties", {"densty": 0.3}, 'did you mean "density"'),
        ("ties", {"density": 0.0}, "above 0"),
        ("ties", {"density": 1.5}, "at most 1"),
        ("ties", {"density": math.nan}, "above 0"),
        ("ties", {"density": "half"}, "expected a float"),
        ("dare", {"drop": 1.0}, "below 1"),
        ("dare", {"drop": True}, "expected a float"),
        ("dare", {"scaling": math.inf}, "not a finite number"),
        ("task-arithmetic", {"scaling": math.nan}, "not a finite number"),
        ("regmean", {"off_diagonal": -0.1}, "between 0 and 1"),
        ("regmean", {"max_length": 0}, "from 1 up"),
        ("lora-lego", {"mode": "fast"}, "known: mass, paper"),
        ("lora-lego", {"n_init": 0}, "from 1 up"),
        ("flora", {"scaling": 1.0}, "known: none"),
    ],
)
def test_wrong_names_and_options_are_refused(name, options, message):
    with pytest.raises(ConfigError, match=message):
        make_merger(name, options)
