"""Coding against an obvious reference in numpy, bit for bit, and the laws that feedback needs."""

import math

import numpy as np
import pytest
import torch

from benchmarks.kernels.codec import counted
from fedlora.ops import delta_codec as op
from fedlora.ops.delta_codec import BLOCK, LEAST_SCALE, decode, decode_sum, encode, quantise
from tests.kernels.close import assert_close, seeded

SIZES = (0, 1, 63, 64, 65, 1000, 1025)
sizes = pytest.mark.parametrize("size", SIZES)
both = pytest.mark.parametrize("levels", [127, 7])


def vector(size, seed=1):
    """Blocks of very different magnitudes, with zeros, ties and entries that are next to none."""
    x = torch.randn(size, generator=seeded(seed)) * 10.0 ** (torch.arange(size) // BLOCK % 9 - 4.0)
    x[torch.rand(size, generator=seeded(seed + 1)) < 0.1] = 0.0
    x[5 * BLOCK : 6 * BLOCK] = 0.0
    # one whose scale is 1 of either width, with multiples of a half
    tied = torch.arange(len(x[2 * BLOCK : 3 * BLOCK])) / 2.0 - 3.5
    if len(tied) == BLOCK:
        tied[:2] = torch.tensor([127.0, -126.5])
        x[2 * BLOCK : 3 * BLOCK] = tied
    return x


def strange(size=6 * BLOCK):
    """What no division likes: denormal, least, largest and infinite numbers, and NaN."""
    x = vector(size, seed=3)
    blocks = x.view(-1, BLOCK)
    blocks[0] *= 1e-38 / blocks[0].abs().max()
    blocks[1] *= 127.0 * LEAST_SCALE / blocks[1].abs().max()
    blocks[2] *= 3e38 / blocks[2].abs().max()
    blocks[3, 5] = float("inf")
    blocks[4, 7] = float("nan")
    blocks[5, 1:3] = torch.tensor([float("nan"), float("-inf")])
    return x


def nearest_bf16(x):
    """By the bits, as float32; NaN stays NaN."""
    bits = x.astype(np.float32).view(np.uint32).astype(np.uint64)
    kept = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16 << 16
    return np.where(np.isnan(x), np.float32("nan"), kept.astype(np.uint32).view(np.float32))


@np.errstate(all="ignore")
def by_loop(x, levels):
    """(codes, scales as float32, what coding takes), block by block."""
    x = x.cpu().numpy()
    codes, scales, left = [], [], []
    for start in range(0, len(x), BLOCK):
        block = x[start : start + BLOCK]
        scale = nearest_bf16(np.abs(block).max(keepdims=True) / np.float32(levels))[0]
        scale = np.float32(0.0) if scale < LEAST_SCALE else scale
        code = np.zeros_like(block)
        if np.isfinite(scale) and scale > 0:
            code = np.clip(np.round(block / scale), -levels, levels)
        codes.append(code.astype(np.int8))
        scales.append(scale)
        left.append(block - code * scale)
    joined = (np.concatenate([np.zeros(0, np.float32), *parts]) for parts in (codes, left))
    codes, left = (torch.from_numpy(part).to(torch.get_default_device()) for part in joined)
    return codes.to(torch.int8), torch.tensor(scales), left


def same(found, expected):
    """Every bit, but for which NaN it is."""
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def random_key(number=7):
    return torch.tensor(number, dtype=torch.int64)


@both
@sizes
@pytest.mark.parametrize("owing", [False, True])
def test_is_the_reference(impl, levels, size, owing):
    delta = vector(size)
    owed = vector(size, seed=9) * 1e-2 if owing else None
    codes, scales, left = encode(delta, levels, owed)
    wanted = by_loop(delta if owed is None else delta + owed, levels)
    same(codes, wanted[0])
    same(scales.float(), wanted[1])
    same(left, wanted[2])


@both
def test_what_is_not_finite_or_next_to_nothing_is_the_reference(impl, levels):
    codes, scales, left = encode(strange(), levels)
    wanted = by_loop(strange(), levels)
    same(codes, wanted[0])
    same(scales.float(), wanted[1])
    same(left, wanted[2])
    assert not bool(scales[3:].isfinite().any())
    assert bool(left.view(-1, BLOCK)[3:].isnan().all())


@both
@sizes
def test_ties_go_to_even(impl, levels, size):
    """Codes of a block whose scale is a power of two, at multiples of half of it."""
    x = (torch.arange(size) % (2 * levels - 1) - levels + 1.0) / 2.0
    x[::BLOCK] = float(levels)
    codes, scales, _ = encode(x, levels)
    assert bool((scales == 1.0).all())
    same(codes, x.round().to(torch.int8))


@both
@sizes
@pytest.mark.parametrize("key", [None, 7])
def test_quantise_is_encode_without_feedback(impl, levels, size, key):
    made = None if key is None else random_key(key)
    codes, scales, _ = encode(vector(size), levels, key=made)
    same(quantise(vector(size), levels, made)[0], codes)
    same(quantise(vector(size), levels, made)[1], scales)


@both
@sizes
def test_what_was_decoded_is_coded_as_before(impl, levels, size):
    codes, scales, _ = encode(vector(size), levels)
    again, same_scales, left = encode(decode(codes, scales), levels)
    same(again, codes)
    same(same_scales, scales)
    assert not bool(left.any())


@both
@sizes
@pytest.mark.parametrize("key", [None, 7])
def test_nothing_is_lost_between_update_and_what_is_owed(impl, levels, size, key):
    """Over several calls: what was sent and what is still owed is all that changed."""
    sent, changed = torch.zeros(size).double(), torch.zeros(size).double()
    owed, largest = None, torch.zeros(size)
    for step in range(4):
        delta = vector(size, seed=20 + step)
        made = None if key is None else random_key(key + step)
        codes, scales, owed = encode(delta, levels, owed, made)
        sent += decode(codes, scales).double()
        changed += delta.double()
        largest = torch.maximum(largest, delta.abs() + owed.abs())
    missing = (sent + owed.double() - changed).abs()
    assert bool((missing <= 4 * 2.0**-23 * largest).all())


@both
def test_every_error_is_below_a_step(impl, levels):
    """Half of one to the nearest, but for the rounding of the scale itself."""
    for key, bound in ((None, 0.501), (random_key(), 1.001)):
        _, scales, left = encode(vector(1000), levels, key=key)
        steps = scales.float().repeat_interleave(BLOCK)[:1000]
        assert bool((left.abs() <= bound * steps).all())


@both
def test_rounding_at_random_is_unbiased(impl, levels):
    """The mean over keys is within Bernstein's bound, which one correct run in 10^6 exceeds."""
    size, draws = 3 * BLOCK - 1, 200
    x = vector(size)
    # all below what rounding to the nearest would keep
    x[BLOCK : 2 * BLOCK] *= 1e-38 / x[BLOCK : 2 * BLOCK].abs().max()
    total, steps = torch.zeros(size).double(), torch.zeros(size)
    for number in range(draws):
        codes, scales, _ = encode(x, levels, key=random_key(number))
        steps = scales.float().repeat_interleave(BLOCK)[:size]
        total += codes.double()
    exact = x.double() / steps.double()
    share = exact - exact.floor()
    deviation = (share * (1.0 - share) / draws).sqrt()
    nats = math.log(2 * size / 1e-6)
    bound = math.sqrt(2.0 * nats) * deviation + nats / (3.0 * draws)
    assert bool(((total / draws - exact).abs() <= bound + 2.0**-14).all())
    # a sum over entries sees what single ones hide
    error = (total / draws - exact).sum().abs()
    assert float(error) <= 4.0 * float(deviation.square().sum().sqrt())


@both
@sizes
def test_draws_are_those_of_philox_by_position(impl, levels, size):
    """Codes at random of the kernel and of the torch definition from words drawn one by one."""
    x, key = vector(size), random_key(2**40 + 5)
    codes, scales, _ = encode(x, levels, key=key)
    steps = scales.float().repeat_interleave(BLOCK)[:size].cpu()
    groups = (torch.arange(size, device="cpu") // 4)[:, None]
    zero = torch.zeros_like(groups)
    words = torch.cat(op.philox(key.cpu(), [groups, zero, zero, zero]), 1)
    draws = words.gather(1, (torch.arange(size, device="cpu") % 4)[:, None])[:, 0] >> 8
    exact = torch.where(steps > 0, x.cpu() / steps, 0.0).abs().clamp(max=levels)
    up = draws.float() < (exact - exact.floor()) * 2.0**24
    same(codes.cpu(), ((exact.floor() + up) * x.cpu().sign()).to(torch.int8))


@both
def test_scales_at_random_are_rounded_up(impl, levels):
    """So that no entry is beyond the last multiple; and never to zero, but from it."""
    x = strange()[: 3 * BLOCK]
    largest = x.view(-1, BLOCK).abs().amax(1)
    scales = encode(x, levels, key=random_key())[1]
    assert bool((scales.double() * levels >= largest.double() * (1 - 2.0**-23)).all())
    assert bool((scales.float() >= LEAST_SCALE).all())
    least = largest.double() / levels * (1 + 2.0**-7)
    assert bool((scales.double() <= least.clamp_min(LEAST_SCALE)).all())
    assert not bool(encode(torch.zeros(BLOCK), levels, key=random_key())[1].any())


@both
def test_scales_between_two_numbers_go_to_the_even_one(impl, levels):
    exact = 1.0 + torch.tensor([1.0, 3.0, 5.0]) * 2.0**-8
    x = torch.zeros(3, BLOCK)
    x[:, 9] = levels * exact
    scales = quantise(x.flatten(), levels)[1]
    same(scales.float(), 1.0 + torch.tensor([0.0, 4.0, 4.0]) * 2.0**-8)


@both
def test_no_entry_is_beyond_the_last_multiple(impl, levels):
    """Also not the next number above the last multiple of a scale that would do otherwise."""
    x = torch.zeros(128, BLOCK)
    last = levels * (1.0 + torch.arange(128) / 128.0)
    x[:, 9] = torch.nextafter(last, torch.tensor(float("inf")))
    scales = quantise(x.flatten(), levels, random_key())[1]
    assert bool((scales.double() * levels >= x[:, 9].double()).all())


@both
def test_what_is_not_finite_at_random(impl, levels):
    codes, scales, left = encode(strange(), levels, key=random_key())
    assert not bool(scales[3:].isfinite().any())
    assert not bool(codes[3 * BLOCK :].any())
    assert bool(left[3 * BLOCK :].isnan().all())


def test_keys_differ(impl):
    x = torch.rand(1000, generator=seeded(1))
    one, other = (encode(x, 7, key=random_key(k))[0] for k in (1, 2**33 + 1))
    assert 0.2 < float((one != other).float().mean()) < 0.5


@both
@sizes
@pytest.mark.parametrize("key", [None, 7])
def test_neighbours_in_memory_are_not_read(impl, levels, size, key):
    made = None if key is None else random_key(key)
    whole = torch.full((size + 200,), float("nan"))
    owing = whole.clone()
    whole[100 : 100 + size], owing[100 : 100 + size] = vector(size), vector(size, seed=9)
    cut = [t[100 : 100 + size] for t in (whole, owing)]
    found = encode(cut[0], levels, cut[1], made)
    expected = encode(cut[0].clone(), levels, cut[1].clone(), made)
    assert all(bool(t.float().isfinite().all()) for t in found)
    for one, other in zip(found, expected, strict=True):
        same(one, other)


def clients(count, size):
    made = [quantise(vector(size, seed=30 + k), 127) for k in range(count)]
    return torch.stack([codes for codes, _ in made]), torch.stack([scales for _, scales in made])


@sizes
@pytest.mark.parametrize("count", [1, 3])
def test_weighted_sum(impl, size, count):
    """In order: to the last bit; and in float64, but for rounding."""
    codes, scales = clients(count, size)
    weights = torch.tensor([0.3, -1.7, 11.0])[:count]
    found = decode_sum(codes, scales, weights)
    total = torch.zeros(size)
    for k in range(count):
        factors = (scales[k].float() * weights[k]).repeat_interleave(BLOCK)[:size]
        total = total + factors * codes[k].float()
    same(found, total)
    wide = scales.double().repeat_interleave(BLOCK, 1)[:, :size]
    exact = (weights.double()[:, None] * wide * codes.double()).sum(0)
    assert_close(found, exact, 1e-6)
    assert_close(decode_sum(codes, scales, weights.double()), exact, 1e-15)


def test_a_client_of_weight_0_is_not_read(impl):
    codes, scales = clients(3, 1000)
    broken = scales.clone()
    broken[1] = float("nan")
    weights = torch.tensor([0.3, 0.0, 0.7])
    same(decode_sum(codes, broken, weights), decode_sum(codes, scales, weights))


def test_nobody(impl):
    empty = torch.empty(0, 100, dtype=torch.int8), torch.empty(0, 2, dtype=torch.bfloat16)
    same(decode_sum(*empty, torch.empty(0)), torch.zeros(100))


@pytest.mark.parametrize("feedback", [True, False])
@pytest.mark.parametrize("key", [None, 7])
def test_registration(feedback, key):
    made = None if key is None else random_key(key)
    owed = vector(100, seed=9) if feedback else None
    torch.library.opcheck(op._encode, (vector(100), 7, owed, made, feedback))
    torch.library.opcheck(op._decode_sum, (*clients(2, 100), torch.tensor([0.5, 2.0])))


def test_compiles_without_a_break():
    def sent(delta, owed):
        codes, scales, left = encode(delta, 127, owed)
        return decode(codes, scales) * 2.0, left

    compiled = torch.compile(sent, fullgraph=True, backend="aot_eager")
    given = vector(100), vector(100, seed=9)
    for one, other in zip(compiled(*given), sent(*given), strict=True):
        same(one, other)


@pytest.mark.parametrize("random", [True, False])
def test_coding_is_one_pass(random):
    """Update and debt are read, codes and debt written, 4 + 4 + 1 + 4 bytes, and the scales."""
    count = counted(64_000, random=random)
    assert count.kernels == 1
    assert count.moved == 64_000 * 13 + 1_000 * 2 + 8 * random
