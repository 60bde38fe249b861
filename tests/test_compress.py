"""Coding: the bytes of a slow reference, bounds, contraction, sizes, and hostile codes."""

import math
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.compress import coded_shapes, compress, expand, kept_entries, round_trip
from fedlora.errors import AdapterError, CodeError
from fedlora.messages import Coding
from fedlora.ops.delta_codec import BLOCK
from fedlora.wire import coded_layout, decode_coded, encode_coded

LEVELS = {"int8": 127, "int4": 7}
CODINGS = [
    Coding(scheme, top_k)
    for scheme in ("none", "bf16", "int8", "int4")
    for top_k in (1.0, 0.5, 0.07)
][1:]
every = pytest.mark.parametrize("coding", CODINGS, ids=lambda c: f"{c.scheme}-{c.top_k:g}")


def draw(count, seed=0, size=1.0):
    return size * torch.randn(count, generator=torch.Generator().manual_seed(seed))


def shapes_of(tensors):
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


@st.composite
def vectors(draw_from):
    """Up to three blocks of any magnitudes that updates can have, many zeros and ties."""
    count = draw_from(st.integers(0, 3 * BLOCK - 5))
    seed = draw_from(st.integers(0, 2**30))
    draws = torch.Generator().manual_seed(seed)
    base = torch.randn(count, generator=draws) * 10.0 ** draw_from(st.integers(-30, 30))
    spread = 10.0 ** (draw_from(st.integers(0, 4)) * torch.randn(count, generator=draws))
    values = (base * spread).clamp(-1e36, 1e36)
    if draw_from(st.booleans()):
        values = values[torch.randint(0, count, (count,), generator=draws)] if count else values
        values[torch.rand(count, generator=draws) < 0.3] = 0.0
    return values


def bits_of(value):
    return struct.unpack("<I", struct.pack("<f", value))[0]


def nearest_bf16(value):
    """Round to nearest even on the bits, as float."""
    bits = bits_of(value)
    kept, rest = bits >> 16, bits & 0xFFFF
    kept += rest > 0x8000 or (rest == 0x8000 and kept & 1)
    return struct.unpack("<f", struct.pack("<I", kept << 16))[0]


def float32(value):
    return struct.unpack("<f", struct.pack("<f", value))[0]


def reference(tensors, coding):
    """(values, scales, index octets, decoded) of every tensor, entry by entry."""
    values, scales, index, decoded = [], [], b"", {}
    for name in sorted(tensors):
        flat = tensors[name].reshape(-1).tolist()
        n, kept = len(flat), kept_entries(tensors[name].numel(), coding)
        chosen = sorted(sorted(range(n), key=lambda i: (-abs(flat[i]), i))[:kept])
        if coding.top_k < 1:
            width = next(w for w in range(1, 9) if n <= 256**w)
            mask = sum(1 << i for i in chosen).to_bytes(math.ceil(n / 8), "little")
            plain = b"".join(i.to_bytes(width, "little") for i in chosen)
            index += mask if len(mask) <= len(plain) else plain
        out, codes = [0.0] * n, []
        for at in range(0, kept, BLOCK):
            block = chosen[at : at + BLOCK]
            if coding.scheme in LEVELS:
                levels = LEVELS[coding.scheme]
                scale = nearest_bf16(float32(max(abs(flat[i]) for i in block) / levels))
                scale = scale if scale >= 2.0**-126 else 0.0
                scales.append(scale)
            for i in block:
                if coding.scheme in LEVELS:
                    code = round(float32(flat[i] / scale)) if scale else 0
                    codes.append(max(-levels, min(levels, code)))
                    out[i] = codes[-1] * scale
                else:
                    out[i] = nearest_bf16(flat[i]) if coding.scheme == "bf16" else flat[i]
                    codes.append(out[i])
        if coding.scheme == "int4":
            codes += [0] * (kept % 2)
            codes = [codes[i] % 16 + 16 * (codes[i + 1] % 16) for i in range(0, len(codes), 2)]
        values += codes
        decoded[name] = torch.tensor(out).reshape(tensors[name].shape)
    return values, scales, index, decoded


def sample(seed=0):
    """Tensors of odd sizes: empty, one entry, a tie, a zero block, more than 256 entries."""
    tie = torch.tensor([[0.5, -0.5, 0.25], [0.5, 0.0, -0.125]])
    zeros = torch.cat([torch.zeros(BLOCK), draw(13, seed + 1, 1e-3)])
    return {
        "z.B": draw(300, seed).reshape(20, 15),
        "a.A": tie,
        "m": zeros,
        "one": torch.tensor([3.0]),
        "none": torch.empty(0, 4),
        "small": draw(70, seed + 2, 1e-6),
    }


@every
@pytest.mark.parametrize("seed", range(3))
def test_the_arrays_are_those_of_the_slow_reference(coding, seed):
    tensors = sample(seed)
    values, scales, index, decoded = reference(tensors, coding)
    arrays = compress(tensors, coding)
    assert arrays["values"].tolist() == values
    assert arrays.get("scale", torch.empty(0)).float().tolist() == scales
    assert bytes(arrays.get("index", torch.empty(0)).to(torch.uint8).tolist()) == index
    found = expand(arrays, shapes_of(tensors), coding)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], decoded[name]) for name in tensors)


@every
@settings(max_examples=25)
@given(vectors())
def test_sizes_follow_from_shapes(coding, values):
    tensors = {"x": values, "y": values[: len(values) // 2].reshape(1, -1)}
    shapes, dtypes = coded_shapes(shapes_of(tensors), coding)
    arrays = compress(tensors, coding)
    assert shapes_of(arrays) == shapes
    assert {name: array.dtype for name, array in arrays.items()} == dtypes
    data = encode_coded(tensors, coding)
    assert len(data) == coded_layout(shapes_of(tensors), coding).total
    found = decode_coded(data, shapes_of(tensors), coding)
    assert all(torch.equal(found[k], v) for k, v in round_trip(tensors, coding).items())


@pytest.mark.parametrize("scheme", ["bf16", "int8", "int4"])
@settings(max_examples=25)
@given(vectors())
def test_what_was_rounded_before_is_not_rounded_again(scheme, values):
    coding = Coding(scheme)
    once = round_trip({"x": values}, coding)
    assert torch.equal(round_trip(once, coding)["x"], once["x"])


@pytest.mark.parametrize("scheme", LEVELS)
@settings(max_examples=25)
@given(vectors())
def test_an_entry_moves_by_half_a_scale_and_not_past_zero_or_twice_itself(scheme, values):
    coding = Coding(scheme)
    scales = compress({"x": values}, coding)["scale"].double()
    error = (round_trip({"x": values}, coding)["x"].double() - values.double()).abs()
    half = scales.repeat_interleave(BLOCK)[: len(values)] / 2
    # a block without a scale is below 2^-126 times the number of levels
    half = torch.where(half > 0, half * (1 + 1e-5), LEVELS[scheme] * 2.0**-126)
    assert bool((error <= half).all())
    assert bool((error <= values.double().abs() * (1 + 1e-6)).all())


@pytest.mark.parametrize("scheme", LEVELS)
def test_a_block_whose_scale_would_lose_bits_is_zero(scheme):
    """The least scale is 2^-126; a block just above it keeps its bound."""
    edge = LEVELS[scheme] * 2.0**-126
    below, above = (draw(BLOCK).clamp(-1, 1) * edge * factor for factor in (0.99, 1.01))
    found = round_trip({"x": torch.cat([below, above])}, Coding(scheme))["x"]
    assert not bool(found[:BLOCK].any())
    assert bool(found[BLOCK:].any())


@settings(max_examples=25)
@given(vectors())
def test_bf16_keeps_eight_bits(values):
    error = (round_trip({"x": values}, Coding("bf16"))["x"].double() - values.double()).abs()
    assert bool((error <= values.double().abs() * 2.0**-8 + 2.0**-133).all())


@pytest.mark.parametrize("top_k", [0.01, 0.3, 0.9])
@settings(max_examples=25)
@given(vectors())
def test_top_k_contracts(top_k, values):
    """||x - C(x)||^2 <= (1 - k/n) ||x||^2, with exactly k entries as they were."""
    coding = Coding("none", top_k)
    found = round_trip({"x": values}, coding)["x"]
    kept = kept_entries(len(values), coding)
    assert int((found != 0).sum()) == min(kept, int((values != 0).sum()))
    assert bool(((found == values) | (found == 0)).all())
    total = (values.double() ** 2).sum()
    rest = ((values.double() - found.double()) ** 2).sum()
    assert rest <= (1 - kept / max(1, len(values))) * total * (1 + 1e-9)


@every
@settings(max_examples=25)
@given(vectors())
def test_every_coding_contracts(coding, values):
    total = (values.double() ** 2).sum()
    left = values.double() - round_trip({"x": values}, coding)["x"].double()
    # below a scale's range nothing travels, and nothing is made up either
    assert (left**2).sum() <= total
    if total and values.abs().max() > 1e-30:
        assert (left**2).sum() < total


@pytest.mark.parametrize(
    ("count", "coding", "values", "scale", "index"),
    [
        (1000, Coding("bf16"), 2 * 1000, 0, 0),
        (1000, Coding("int8"), 1000, 2 * 16, 0),
        (1001, Coding("int4"), 501, 2 * 16, 0),
        (1000, Coding("none", 0.25), 4 * 250, 0, 125),
        (1000, Coding("none", 0.01), 4 * 10, 0, 2 * 10),
        (200, Coding("int8", 0.05), 10, 2 * 1, 10),
        (70_000, Coding("int4", 0.01), 350, 2 * 11, 3 * 700),
        (70_000, Coding("int4", 0.05), 1750, 2 * 55, 8750),
    ],
)
def test_bytes_by_hand(count, coding, values, scale, index):
    arrays = compress({"x": draw(count)}, coding)
    nbytes = {name: array.numel() * array.element_size() for name, array in arrays.items()}
    expected = {"values": values, "scale": scale, "index": index}
    assert nbytes == {name: size for name, size in expected.items() if size}


SHAPES = {"w": (9, 10)}


def arrays_of(coding):
    return compress({"w": draw(90).reshape(9, 10)}, coding)


HOSTILE = {
    "int8 code -128": (Coding("int8"), "values", 5, -128),
    "int4 code -8": (Coding("int4"), "values", 5, 0x80),
    "int4 code -8, low half": (Coding("int4"), "values", 5, 0x08),
    "int4 code after the last": (Coding("int4", 0.1), "values", 4, 0x10),
    "scale NaN": (Coding("int8"), "scale", 1, math.nan),
    "scale infinite": (Coding("int4"), "scale", 0, math.inf),
    "scale negative": (Coding("int4"), "scale", 0, -1.0),
    "scale minus zero": (Coding("int8"), "scale", 0, -0.0),
    "mask with one bit more": (Coding("bf16", 0.5), "index", slice(None), 255),
    "mask of nothing": (Coding("bf16", 0.5), "index", slice(None), 0),
    "mask beyond the end": (Coding("none", 0.5), "index", 11, 255),
    "position beyond the end": (Coding("none", 0.1), "index", 8, 90),
    "positions twice": (Coding("int4", 0.1), "index", slice(3, 5), 40),
    "positions that fall": (Coding("int8", 0.1), "index", 0, 89),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_codes_are_refused(case):
    coding, array, at, value = HOSTILE[case]
    arrays = arrays_of(coding)
    assert expand(arrays, SHAPES, coding)
    arrays[array] = arrays[array].clone()
    arrays[array][at] = value
    with pytest.raises(CodeError, match="w"):
        expand(arrays, SHAPES, coding)


def test_a_mask_that_names_as_many_but_beyond_the_end_is_refused():
    """Its count is right, so that only the padding gives it away."""
    coding = Coding("none", 0.5)
    arrays = arrays_of(coding)
    mask = int.from_bytes(bytes(arrays["index"].tolist()), "little")
    moved = mask & (mask - 1) | 1 << 95
    arrays["index"] = torch.tensor(list(moved.to_bytes(12, "little")), dtype=torch.uint8)
    with pytest.raises(CodeError, match="45 entries"):
        expand(arrays, SHAPES, coding)


@every
@settings(max_examples=25)
@given(st.data())
def test_no_payload_raises_anything_else_or_is_of_another_shape(coding, data):
    payload = bytearray(encode_coded({"w": draw(90).reshape(9, 10)}, coding))
    for _ in range(data.draw(st.integers(1, 4))):
        payload[data.draw(st.integers(0, len(payload) - 1))] = data.draw(st.integers(0, 255))
    try:
        found = decode_coded(bytes(payload), SHAPES, coding)
    except AdapterError:
        return
    assert shapes_of(found) == SHAPES
    assert found["w"].dtype == torch.float32
    if coding.scheme in LEVELS:
        assert bool(torch.isfinite(found["w"]).all())


@every
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_never_passes_for_finite(coding, value):
    tensors = {"w": draw(90).reshape(9, 10)}
    tensors["w"][3, 4] = value
    try:
        found = decode_coded(encode_coded(tensors, coding), SHAPES, coding)
    except CodeError:
        return
    assert not bool(torch.isfinite(found["w"]).all())
