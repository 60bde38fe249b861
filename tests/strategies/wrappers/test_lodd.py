"""LoDD: its Gram form against covariances, its geometry, and whom it flags."""

import math

import pytest
import torch

from fedlora.errors import ConfigError
from fedlora.strategies.wrappers.lodd import cloud_score, dispersions
from tests.strategies.quadratic import gauss
from tests.strategies.rounds import update
from tests.strategies.wrappers.around import crowd, moved, scaled, squared, wrapped


def direct(points, kappa, dimension):
    """The definition: eigenvalues of the covariance of unit directions, divided by kappa."""
    scores = []
    for i in range(len(points)):
        gaps = points - points[i]
        lengths = gaps.norm(dim=1)
        lengths[i] = torch.inf
        near = lengths.argsort()[:kappa]
        units = gaps[near] / lengths[near][:, None]
        units = units - units.mean(0)
        eigenvalues = torch.linalg.eigvalsh(units.T @ units / kappa)
        total, squares = float(eigenvalues.sum()), float((eigenvalues**2).sum())
        spread = dimension / (dimension - 1)
        scores.append(0.5 * total**2 + 0.5 * spread * (total**2 - squares))
    return torch.tensor(scores, dtype=torch.float64)


@pytest.mark.parametrize(("n", "d", "kappa"), [(15, 4, 6), (20, 50, 14), (12, 2, 11)])
def test_the_gram_form_is_the_covariance_form(n, d, kappa):
    points = gauss(n, d, seed=d)
    found = dispersions(squared(points), kappa, d)
    torch.testing.assert_close(found, direct(points, kappa, d), rtol=1e-12, atol=1e-12)


def test_centre_ray_and_line():
    axes = torch.eye(5, dtype=torch.float64)
    star = torch.cat([torch.zeros(1, 5).double(), axes, -axes])
    assert float(dispersions(squared(star), 10, 5)[0]) == pytest.approx(1.0)
    ray = torch.arange(6.0).double()[:, None] * gauss(1, 3, seed=1)
    found = dispersions(squared(ray), 4, 3)
    assert float(found[0]) == pytest.approx(0.0, abs=1e-12)
    # two neighbours on each side
    assert float(found[2]) == pytest.approx(0.5)


def test_one_dimension_does_not_divide_by_zero():
    line = torch.arange(5.0).double()[:, None]
    assert float(dispersions(squared(line), 4, 1)[2]) == pytest.approx(0.5)


def test_translation_rotation_and_scale_change_nothing():
    points = gauss(14, 6, seed=3)
    turn = torch.linalg.qr(gauss(6, 6, seed=4)).Q
    elsewhere = 7.5 * points @ turn + gauss(1, 6, seed=5)
    found, again = (dispersions(squared(p), 9, 6) for p in (points, elsewhere))
    torch.testing.assert_close(again, found, rtol=1e-11, atol=1e-11)


def test_the_rim_of_a_disc_scores_low_and_its_middle_high():
    draws = torch.Generator().manual_seed(0)
    radius = torch.rand(800, generator=draws).double().sqrt()
    angle = 2 * math.pi * torch.rand(800, generator=draws).double()
    points = torch.stack([radius * angle.cos(), radius * angle.sin()], 1)
    distances = torch.cdist(points, points) ** 2
    scores = dispersions(distances, 20, 2)
    assert float(scores[radius > 0.95].mean()) < 0.45
    assert float(scores[radius < 0.5].mean()) > 0.8


@pytest.mark.parametrize("far", [1.0, 3.0])
def test_an_isolated_point_scores_lowest(far):
    spread = 500**0.5
    for seed in range(10):
        points = gauss(20, 500, seed=seed)
        away = gauss(500, seed=100 + seed)
        points[7] += far * spread * away / away.norm()
        scores = dispersions(squared(points), 14)
        assert int(scores.argmin()) == 7
        assert float(scores[7]) < 0.7 * cloud_score(14)


@pytest.mark.parametrize("n", [12, 20, 40])
def test_an_independent_cloud_of_many_dimensions_scores_l0(n):
    kappa = math.floor(0.75 * (n - 1))
    scores = dispersions(squared(gauss(n, 2000, seed=n)), kappa)
    assert float(scores.mean()) == pytest.approx(cloud_score(kappa), rel=0.05)
    assert float(scores.min()) > 0.8 * cloud_score(kappa)
    assert cloud_score(8) == pytest.approx(0.178, abs=1e-3)


@pytest.mark.parametrize(("group", "seen"), [(1, True), (2, True), (4, True), (9, False)])
def test_coordinated_groups_are_seen_up_to_a_third_of_the_neighbours(group, seen):
    """A larger group is a cloud of its own: a known limit, which Krum's rules do not share."""
    points = gauss(20, 500, seed=group)
    away = gauss(500, seed=50)
    points[:group] += 3 * 500**0.5 * away / away.norm()
    low = dispersions(squared(points), 14) < 0.7 * cloud_score(14)
    assert not bool(low[group:].any())
    assert bool(low[:group].all()) is seen


def test_twins_have_no_direction_and_no_nan():
    points = gauss(12, 30, seed=6)
    points[1] = points[2] = points[0]
    found = dispersions(squared(points), 8)
    assert bool(torch.isfinite(found).all())
    # by hand: the two twins among the neighbours are left out
    rest = torch.cat([points[:1], points[3:]])
    assert float(found[0]) == pytest.approx(float(dispersions(squared(rest), 6)[0]))
    same = points[:1].expand(5, -1)
    assert dispersions(squared(same), 3).tolist() == [1.0] * 5


def outliers(chosen, state, n, odd):
    """Honest clients around the broadcast, and some far away in directions of their own."""
    updates = crowd(chosen, state, n, size=0.1)
    return [scaled(u, 40.0) if i in odd else u for i, u in enumerate(updates)]


@pytest.mark.parametrize("space", ["product", "factor"])
def test_flagged_clients_are_written_down_and_nothing_else_by_default(space):
    chosen, state, _ = wrapped("lodd", options={"space": space, "threshold": 0.3})
    updates = outliers(chosen, state, 20, {3})
    passed, notes = chosen.screen(state, updates)
    assert passed is updates
    assert list(notes["flagged"]) == ["c03"]
    assert "acted_on" not in notes
    stats = chosen.reduce(state, updates)
    assert stats.notes["lodd"] == notes
    assert chosen.exact == chosen.inner.exact


@pytest.mark.parametrize("action", ["drop", "downweight"])
def test_what_is_done_to_flagged_clients(action):
    chosen, state, _ = wrapped("lodd", options={"action": action, "threshold": 0.3})
    updates = outliers(chosen, state, 20, {3})
    passed, notes = chosen.screen(state, updates)
    assert notes["acted_on"] == ["c03"]
    if action == "drop":
        assert passed == [u for u in updates if u.client != "c03"]
    else:
        factors = [a.weight / b.weight for a, b in zip(passed, updates, strict=True)]
        assert factors == pytest.approx([0.1 if i == 3 else 1.0 for i in range(20)])


def test_never_more_than_three_tenths_are_dropped():
    """With a threshold that flags everybody."""
    chosen, state, _ = wrapped("lodd", options={"action": "drop", "threshold": 10.0})
    updates = [update(chosen, state, f"c{i:02d}", i) for i in range(14)]
    passed, notes = chosen.screen(state, updates)
    assert len(notes["flagged"]) == 14
    assert len(passed) == 14 - 4
    lowest = sorted(notes["flagged"], key=notes["flagged"].get)[:4]
    assert notes["acted_on"] == sorted(lowest)


def test_few_clients_switch_it_off():
    chosen, state, _ = wrapped("lodd", options={"action": "drop"})
    updates = outliers(chosen, state, 11, {3})
    passed, notes = chosen.screen(state, updates)
    assert passed is updates
    assert notes == {"inactive": "11 updates, fewer than 12"}


def test_options_out_of_range_are_refused():
    with pytest.raises(ConfigError, match='action = "ban" is not known; choose "log"'):
        wrapped("lodd", options={"action": "ban"})
    with pytest.raises(ConfigError, match="kappa = 1; expected at least 2"):
        wrapped("lodd", options={"kappa": 1})
    chosen, state, _ = wrapped("lodd", options={"kappa": 99, "space": "factor"})
    chosen.screen(state, [moved(u, u.delta.tensors) for u in crowd(chosen, state, 12)])
