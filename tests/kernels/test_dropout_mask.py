"""Masks made again: whose they are, what rate they have, and that no kernel has others."""

import math

import pytest
import torch

from fedlora.ops import row_ops
from fedlora.ops.dropout_mask import Dropout, keep_mask, philox
from tests.kernels.conftest import GPU
from tests.kernels.low_rank import mask_of

KEY = 0x0123456789ABCDEF


def drop(rate, key=KEY, tokens=1, stream=0):
    return Dropout(rate, torch.tensor(key), tokens, stream)


def test_known_answers_of_the_generator():
    """kat_vectors of Random123 for philox4x32-7, https://github.com/DEShawResearch/random123."""
    zero = torch.zeros(1, dtype=torch.int64)
    words = [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]
    assert [int(w) for w in philox(zero, [zero] * 4)] == words
    counter = [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344]
    key = torch.tensor([0x299F31D0A4093822])
    words = [0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A]
    assert [int(w) for w in philox(key, [zero + c for c in counter])] == words


def test_an_entry_takes_its_16_bits_of_its_draw():
    """Column 8 g + 2 w + h is half h of word w of the counter (g, token, example, stream)."""
    zero = torch.zeros(1, dtype=torch.int64)
    words = philox(zero + KEY, [zero + 1, zero + 2, zero + 1, zero + 9])
    draws = [int(word) >> 16 * half & 0xFFFF for word in words for half in (0, 1)]
    for rate in (0.1, 0.5, 0.9):
        kept = mask_of(drop(rate, KEY, 3, 9), 6, 13)[5, 8:]
        assert kept.tolist() == [d >= round(rate * 65536) for d in draws[:5]]


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 0.99])
def test_rate_and_independence(rate):
    """Within five standard deviations; neighbours in a row, in a column and in a draw."""
    kept = mask_of(drop(rate, tokens=20), 400, 800).double()
    share = 1.0 / drop(rate).upscale
    assert abs(share - (1.0 - rate)) < 1e-5
    deviation = math.sqrt(share * (1.0 - share) / kept.numel())
    assert abs(float(kept.mean()) - share) <= 5 * deviation
    centred = kept - share
    variance = share * (1.0 - share)
    for shift in ((0, 1), (0, 8), (1, 0)):
        product = centred * centred.roll(shift, (0, 1))
        assert abs(float(product.mean())) <= 5 * variance / math.sqrt(kept.numel())


def test_other_keys_and_streams_other_masks():
    """Also if keys differ only above 32 bits."""
    masks = [mask_of(drop(0.5, key), 50, 64) for key in (KEY, KEY + 1, KEY + 2**40)]
    masks += [mask_of(drop(0.5, stream=stream), 50, 64) for stream in (1, 2**31 - 1)]
    for i, one in enumerate(masks):
        for other in masks[:i]:
            assert abs(float((one == other).double().mean()) - 0.5) < 0.05


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("width", "tokens"), [(5, 1), (64, 70), (100, 8)])
def test_kernels_have_the_mask_of_the_definition(kind, width, tokens, monkeypatch):
    """Bit for bit: the identity as a factor shows every entry, forward and backward."""
    monkeypatch.setenv("FEDLORA_OPS", "triton" if GPU else "interpret")
    rows, keys, way = 70, torch.tensor([KEY]), row_ops.TRITON
    dropout = Dropout(0.3, keys, tokens, 2**31 - 5)
    kept = mask_of(dropout, rows, width)
    ones, eye = torch.ones(rows, width, dtype=kind), torch.eye(width, dtype=kind)
    tail = ([rows], dropout, way)
    assert torch.equal(row_ops.shrink(ones, eye[None], *tail) != 0, kept)
    back = torch.zeros(rows, width, dtype=kind)
    row_ops.expand_(back, ones, eye[None], *tail)
    assert torch.equal(back != 0, kept)
    each = torch.eye(rows, dtype=kind)
    assert torch.equal(row_ops.factor_grads(each, ones, *tail)[0] != 0, kept)


def test_a_row_far_down_has_a_mask_of_its_own():
    """Examples, tokens and columns count apart, so that no product of them overflows."""
    zero, key = torch.zeros(3, dtype=torch.int64), torch.tensor([KEY])
    far = torch.tensor([0, 2**31 - 1, 2**31 - 2])
    masks = [
        *keep_mask(key, far, zero, 4096, drop(0.5)),
        *keep_mask(key, zero, far, 4096, drop(0.5))[1:],
    ]
    for i, one in enumerate(masks):
        for other in masks[:i]:
            assert abs(float((one == other).double().mean()) - 0.5) < 0.05


@pytest.mark.parametrize("rate", [-0.1, 1.0, 0.999999, float("nan")])
def test_a_rate_that_leaves_nothing_is_refused(rate):
    with pytest.raises((AssertionError, ValueError)):
        drop(rate)
