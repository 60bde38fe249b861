"""The mechanism that protects clients, and mechanisms that do not."""

import math

import pytest
import torch

from fedlora.privacy.central import AdaptiveClip, CentralGaussian, clipped_sum
from fedlora.privacy.noise import NoiseMode, noise_source
from tests.privacy import central_oracles
from tests.privacy.central_mutants import MUTANTS
from tests.privacy.central_oracles import ORACLES, SHAPES, update

MODES: list[NoiseMode] = ["secure", "test"]


def make_of(kind):
    def make(noise_multiplier, expected, source, adaptive=None):
        return kind(noise_multiplier, expected, source, adaptive)

    return make


@pytest.mark.parametrize("oracle", ORACLES, ids=lambda oracle: oracle.__name__)
def test_the_mechanism_answers_every_oracle(oracle):
    oracle(make_of(CentralGaussian))


@pytest.mark.parametrize("name", MUTANTS)
def test_a_broken_mechanism_is_caught(name):
    kind, oracle = MUTANTS[name]
    with pytest.raises((AssertionError, ZeroDivisionError)):
        getattr(central_oracles, oracle)(make_of(kind))


@pytest.mark.slow
@pytest.mark.parametrize("repeat", range(60))
def test_no_oracle_raises_a_false_alarm(repeat):
    for oracle in ORACLES:
        oracle(make_of(CentralGaussian))


@pytest.mark.parametrize("mode", MODES)
def test_noise_has_its_scale_from_every_source(mode):
    draw = CentralGaussian(2.0, 4.0, lambda n: noise_source(mode, 1, n)).round(1, [], SHAPES, 3.0)
    values = torch.cat([t.flatten() for t in draw.mean.values()])
    assert abs(float(values.std()) / 1.5 - 1) < 5 / math.sqrt(2 * len(values))


def test_clipped_sum_is_the_plain_loop_over_clients():
    crowd = [update(seed, norm) for seed, norm in enumerate((0.2, 0.9, 7.0))]
    found = clipped_sum(crowd, SHAPES, 1.0)
    for name in SHAPES:
        slow = torch.zeros(SHAPES[name], dtype=torch.float64)
        for one in crowd:
            norm = torch.cat([one[key].flatten().double() for key in SHAPES]).norm()
            slow += one[name].double() / max(1.0, float(norm))
        torch.testing.assert_close(found.sums[name], slow)
    assert found.within == 0.5


@pytest.mark.parametrize(("z", "expected"), [(0.7, 1000.0), (3.0, 100.0), (5.0, 4.0)])
def test_sum_and_count_are_charged_like_one_sum(z, expected):
    adaptive = AdaptiveClip()
    total, count = adaptive.sum_multiplier(z, expected), adaptive.count_noise(z, expected)
    assert total**-2 + (2 * count) ** -2 == pytest.approx(z**-2, rel=1e-12)


@pytest.mark.parametrize("start", [0.01, 100.0])
def test_adaptive_clip_finds_the_median_through_its_own_noise(start):
    crowd = [update(i, 1.05 ** (i - 50), {"x": (2,)}) for i in range(101)]
    mechanism = CentralGaussian(
        1.0, 101.0, lambda number: noise_source("test", 3, number), AdaptiveClip()
    )
    clip = start
    for number in range(150):
        within = mechanism.round(number, crowd, {"x": (2,)}, clip).within
        clip = AdaptiveClip().next_clip(clip, within)
    assert 1 / 1.3 < clip < 1.3


def test_noise_beyond_all_bounds_moves_the_clip_norm_by_one_step_at_most():
    clip = AdaptiveClip()
    assert clip.next_clip(1.0, 1e9) == pytest.approx(math.exp(-0.1))
    assert clip.next_clip(1.0, -1e9) == pytest.approx(math.exp(0.1))
