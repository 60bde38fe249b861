"""Noise sources: standard normal, symmetric, never twice the same but in "test"."""

import math
import os

import pytest
import torch
from scipy import stats

from fedlora.privacy.noise import (
    NoiseMode,
    OsNoise,
    SecureNoise,
    TestNoise,
    noise_source,
    normal_of_bits,
)

MODES: list[NoiseMode] = ["os", "secure", "test"]


@pytest.mark.parametrize("mode", MODES)
def test_values_are_standard_normal(mode: NoiseMode) -> None:
    draw = noise_source(mode, 7).normal((40_000,))
    assert draw.dtype == torch.float64
    # false alarm once in a million runs
    assert stats.kstest(draw.numpy(), "norm").pvalue > 1e-6
    assert abs(float(draw.var()) - 1) < 5 * math.sqrt(2 / len(draw))


@pytest.mark.parametrize("mode", MODES)
def test_two_draws_of_one_source_are_uncorrelated(mode: NoiseMode) -> None:
    source = noise_source(mode, 7)
    first, second = source.normal((20_000,)), source.normal((20_000,))
    assert abs(float((first * second).mean())) < 6 / math.sqrt(len(first))


@pytest.mark.parametrize("source", [OsNoise(), SecureNoise()])
def test_private_noise_follows_no_seed(source: OsNoise | SecureNoise) -> None:
    torch.manual_seed(3)
    first = source.normal((8,))
    torch.manual_seed(3)
    assert not torch.equal(first, source.normal((8,)))


@pytest.mark.parametrize("source", [OsNoise(), SecureNoise()])
def test_a_forked_process_draws_other_noise(source: OsNoise | SecureNoise) -> None:
    source.normal((1,))
    reads, writes = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writes, source.normal((4,)).numpy().tobytes())
        os._exit(0)
    os.waitpid(child, 0)
    theirs = torch.frombuffer(bytearray(os.read(reads, 32)), dtype=torch.float64)
    assert not torch.equal(theirs, source.normal((4,)))


def test_test_noise_is_that_of_its_seed_and_names() -> None:
    draw = TestNoise(7, "round", 1).normal((8,))
    assert torch.equal(draw, TestNoise(7, "round", 1).normal((8,)))
    for other in (TestNoise(8, "round", 1), TestNoise(7, "round", 2)):
        assert not torch.equal(draw, other.normal((8,)))


def test_every_pattern_of_bits_gives_a_finite_value_and_its_mirror() -> None:
    magnitudes = [0, 1, (1 << 52) - 1, 1 << 51]
    words = torch.tensor([*magnitudes, *(m - (1 << 63) for m in magnitudes)])
    values = normal_of_bits(words.numpy().tobytes())
    assert torch.isfinite(values).all()
    assert torch.equal(values[:4], -values[4:])
    expected = stats.norm.isf([(m + 0.5) * 2.0**-53 for m in magnitudes])
    torch.testing.assert_close(values[:4], torch.from_numpy(expected))


def test_shapes_are_as_asked_also_the_empty_ones() -> None:
    for mode in MODES:
        for shape in ((), (0,), (2, 3), (0, 4)):
            assert noise_source(mode, 1).normal(shape).shape == shape
