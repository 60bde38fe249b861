"""Deltas as integers: against an obvious loop, and what rounding at random and feedback promise."""

import math

import numpy as np
import pytest
import torch

from fedlora.ops.delta_codec import BLOCK, decode, draws, encode
from tests.kernels.close import seeded
from tests.kernels.conftest import GPU
from tests.kernels.low_rank import normal

LEVELS = (127, 7)
SIZES = (0, 1, 63, 64, 65, 1000, 1024 + 7)
KEY = torch.tensor(0x0123456789ABCDEF)


def delta(n, seed=0):
    """Entries of very different sizes, and in a buffer with NaN behind them."""
    buffer = torch.full((n + 5,), float("nan"))
    sizes = 10.0 ** torch.linspace(-6, 2, max(n, 1))[:n]
    buffer[:n] = normal(n, seed=seed, dtype=torch.float32) * sizes
    return buffer[:n]


def obvious(values, levels):
    """Codes and scales, block by block and entry by entry."""
    codes, scales = [], []
    for start in range(0, len(values), BLOCK):
        block = values[start : start + BLOCK].numpy()
        scale = torch.tensor(np.abs(block).max() / np.float32(levels)).to(torch.bfloat16)
        scales.append(scale)
        for x in block:
            step = np.float32(x) / np.float32(float(scale))
            codes.append(max(-levels, min(levels, int(np.rint(step)))))
    return codes, torch.stack(scales) if scales else torch.empty(0, dtype=torch.bfloat16)


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("n", SIZES)
def test_codes_are_those_of_an_obvious_loop(impl, n, levels):
    values = delta(n)
    coded = encode(values, levels)
    codes, scales = obvious(values, levels)
    assert coded.codes.tolist() == codes
    assert torch.equal(coded.scales, scales)
    assert not coded.owed.numel()


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("random", [False, True])
@pytest.mark.parametrize("owed", [False, True])
def test_the_kernel_gives_the_definitions_bits(levels, random, owed, monkeypatch):
    values, before = delta(1031), delta(1031, seed=1) if owed else None
    key = KEY if random else None
    monkeypatch.setenv("FEDLORA_OPS", "torch")
    expected = encode(values, levels, before, key)
    monkeypatch.setenv("FEDLORA_OPS", "triton" if GPU else "interpret")
    found = encode(values, levels, before, key)
    for name, tensor in vars(expected).items():
        assert torch.equal(getattr(found, name), tensor), name


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("random", [False, True])
def test_all_that_was_sent_and_is_owed_is_all_that_there_was(impl, levels, random):
    values, before = delta(500), delta(500, seed=1)
    coded = encode(values, levels, before, KEY if random else None)
    whole = values + before
    sent = decode(coded.codes, coded.scales)
    torch.testing.assert_close(sent + coded.owed, whole, rtol=1e-6, atol=1e-6 * float(whole.max()))
    step = coded.scales.float().repeat_interleave(BLOCK)[:500]
    assert bool((coded.owed.abs() <= (1.0 if random else 0.51) * step).all())


@pytest.mark.parametrize("levels", LEVELS)
def test_what_was_decoded_has_the_same_codes_again(impl, levels):
    coded = encode(delta(1000), levels)
    again = encode(decode(coded.codes, coded.scales), levels)
    assert torch.equal(again.codes, coded.codes)
    assert torch.equal(again.scales, coded.scales)


@pytest.mark.parametrize("levels", LEVELS)
def test_rounding_at_random_has_the_expected_value(levels):
    """Within five standard deviations of the mean of 2,000 roundings, of at most half a step."""
    values = delta(128)
    total = torch.zeros(128, dtype=torch.float64)
    for i in range(2000):
        coded = encode(values, levels, key=torch.tensor(i * 7919))
        total += decode(coded.codes, coded.scales).double()
    step = coded.scales.double().repeat_interleave(BLOCK)
    wrong = (total / 2000 - values.double()).abs() / step
    assert float(wrong.max()) <= 5 * 0.5 / math.sqrt(2000)


def test_draws_are_uniform_and_of_their_key():
    found = draws(KEY, 64000).double()
    assert float(found.min()) >= 0.0
    assert float(found.max()) < 1.0
    assert abs(float(found.mean()) - 0.5) < 5 * math.sqrt(1 / 12 / 64000)
    assert torch.equal(draws(KEY, 64), draws(KEY, 64000)[:64])
    assert not torch.equal(draws(KEY + 1, 64), draws(KEY, 64))


@pytest.mark.parametrize("random", [False, True])
def test_what_is_not_finite_stays_so_in_its_block(impl, random):
    values = torch.ones(4 * BLOCK)
    values[5], values[BLOCK] = float("nan"), -float("inf")
    coded = encode(values, 127, key=KEY if random else None)
    assert math.isnan(coded.scales[0])
    assert math.isinf(coded.scales[1])
    assert not coded.codes[: 2 * BLOCK].any()
    assert (decode(coded.codes, coded.scales)[2 * BLOCK :] - 1.0).abs().max() < 0.01


@pytest.mark.parametrize("size", [0.0, 1e-45, 1e-39, 2.0**-126, 3e38])
@pytest.mark.parametrize("levels", LEVELS)
def test_very_small_and_very_large(impl, size, levels):
    values = torch.linspace(-1.0, 1.0, BLOCK) * size
    coded = encode(values, levels)
    error = (decode(coded.codes, coded.scales) - values).abs()
    assert bool((error <= max(0.51 * float(coded.scales[0]), 2.0**-119)).all())


@pytest.mark.parametrize("owed", [False, True])
@pytest.mark.parametrize("random", [False, True])
def test_op_is_sound(owed, random, monkeypatch):
    monkeypatch.setenv("FEDLORA_OPS", "torch")
    given = (delta(70), delta(70, 1) if owed else None, KEY if random else None, 127)
    torch.library.opcheck(torch.ops.fedlora.delta_encode.default, given)


def test_float64_has_the_same_codes():
    values = torch.randn(200, generator=seeded(3))
    assert torch.equal(encode(values.double(), 127).codes, encode(values, 127).codes)
