"""Masks made again: whose they are, what rate they have, and that no kernel has others."""

import math

import pytest
import torch

from fedlora.ops import row_ops
from fedlora.ops.dropout_mask import Dropout, keep_mask, philox, upscale
from fedlora.ops.dropout_shrink import dropout_shrink
from tests.kernels.close import assert_close, seeded
from tests.kernels.conftest import GPU
from tests.kernels.low_rank import normal

KEY = 0x0123456789ABCDEF


def drop(rate, key=KEY):
    return Dropout(rate, torch.tensor(key))


def test_known_answers_of_the_generator():
    """kat_vectors of Random123 for philox4x32-10, https://github.com/DEShawResearch/random123."""
    zero = torch.zeros((), dtype=torch.int64)
    words = [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert [int(w) for w in philox(zero, [zero] * 4)] == words
    counter = [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344]
    key = torch.tensor(0x299F31D0A4093822)
    words = [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]
    assert [int(w) for w in philox(key, [zero + c for c in counter])] == words


def test_an_entry_takes_its_16_bits_of_its_draw():
    """Column 8 g + 2 w + h is half h of word w of the counter (g, row, 0, 0)."""
    zero = torch.zeros((), dtype=torch.int64)
    words = philox(zero + KEY, [zero + 1, zero + 5, zero, zero])
    draws = [int(word) >> 16 * half & 0xFFFF for word in words for half in (0, 1)]
    for rate in (0.1, 0.5, 0.9):
        kept = keep_mask(zero + KEY, zero[None] + 5, 13, rate)[0, 8:]
        assert kept.tolist() == [d >= round(rate * 65536) for d in draws[:5]]


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 0.99])
def test_rate_and_independence(rate):
    """Within five standard deviations; neighbours in a row, in a column and in a draw."""
    kept = keep_mask(torch.tensor(KEY), torch.arange(400), 800, rate).double()
    share = 1.0 / upscale(rate)
    assert abs(share - (1.0 - rate)) < 1e-5
    deviation = math.sqrt(share * (1.0 - share) / kept.numel())
    assert abs(float(kept.mean()) - share) <= 5 * deviation
    centred = kept - share
    variance = share * (1.0 - share)
    for shift in ((0, 1), (0, 8), (1, 0)):
        product = centred * centred.roll(shift, (0, 1))
        assert abs(float(product.mean())) <= 5 * variance / math.sqrt(kept.numel())


def test_other_keys_other_masks():
    """Also if they differ only above 32 bits."""
    rows = torch.arange(50)
    masks = [keep_mask(torch.tensor(k), rows, 64, 0.5) for k in (KEY, KEY + 1, KEY + 2**40)]
    for i, one in enumerate(masks):
        for other in masks[:i]:
            assert abs(float((one == other).double().mean()) - 0.5) < 0.05


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [5, 64, 100])
def test_kernels_have_the_mask_of_the_definition(kind, width, monkeypatch):
    """Bit for bit: the identity as a factor shows every entry, forward and backward."""
    monkeypatch.setenv("FEDLORA_OPS", "triton" if GPU else "interpret")
    rows, keys, way = 70, torch.tensor([KEY]), row_ops.TRITON
    kept = keep_mask(keys[0], torch.arange(rows), width, 0.3)
    ones, eye = torch.ones(rows, width, dtype=kind), torch.eye(width, dtype=kind)
    tail = ([rows], keys, 0.3, way)
    assert torch.equal(row_ops.shrink(ones, eye[None], *tail) != 0, kept)
    back = torch.zeros(rows, width, dtype=kind)
    row_ops.expand_(back, ones, eye[None], *tail)
    assert torch.equal(back != 0, kept)
    each = torch.eye(rows, dtype=kind)
    assert torch.equal(row_ops.factor_grads(each, ones, *tail)[0] != 0, kept)


def test_a_row_far_down_has_a_mask_of_its_own():
    """Rows and columns count apart, so that no product of both overflows."""
    rows = torch.tensor([0, 2**31 - 1, 2**31 - 2])
    masks = keep_mask(torch.tensor(KEY), rows, 4096, 0.5)
    for i, one in enumerate(masks):
        for other in masks[:i]:
            assert abs(float((one == other).double().mean()) - 0.5) < 0.05


@pytest.mark.parametrize("kind", [torch.float64, torch.float32], ids=str)
def test_equals_a_masked_product(impl, kind):
    x = normal(3, 11, 40, seed=1, dtype=kind).requires_grad_()
    a = normal(6, 40, seed=2, dtype=kind).requires_grad_()
    mask = keep_mask(torch.tensor(KEY), torch.arange(33), 40, 0.2).view(3, 11, 40).double()
    wide_x, wide_a = (t.detach().double().requires_grad_() for t in (x, a))
    expected = (wide_x * mask * upscale(0.2)) @ wide_a.T
    found = dropout_shrink(x, a, drop(0.2))
    g = torch.randn(3, 11, 6, generator=seeded(3), dtype=torch.float64)
    pairs = zip(
        (found, *torch.autograd.grad(found, (x, a), g.to(kind))),
        (expected, *torch.autograd.grad(expected, (wide_x, wide_a), g)),
        strict=True,
    )
    for one, other in pairs:
        assert_close(one, other, 1e-12 if kind == torch.float64 else 1e-5)


def test_gradcheck():
    x = normal(4, 9, seed=1).requires_grad_()
    a = normal(2, 9, seed=2).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, a: dropout_shrink(x, a, drop(0.4)), (x, a))


def test_compiles_without_a_break():
    x, a = normal(4, 9, seed=1).requires_grad_(), normal(2, 9, seed=2)
    torch._dynamo.reset()
    compiled = torch.compile(dropout_shrink, fullgraph=True, backend="aot_eager")
    assert_close(compiled(x, a, drop(0.4)), dropout_shrink(x, a, drop(0.4)), 1e-14)


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.9])
def test_only_the_input_is_kept(rate):
    x, a = normal(64, 32, seed=1).requires_grad_(), normal(4, 32, seed=2).requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        dropout_shrink(x, a, drop(rate))
    assert sorted(t.numel() for t in kept) == [1, a.numel(), x.numel()]


@pytest.mark.parametrize("rate", [-0.1, 1.0, 0.999999, float("nan")])
def test_a_rate_that_leaves_nothing_is_refused(rate):
    with pytest.raises((AssertionError, ValueError)):
        drop(rate)
