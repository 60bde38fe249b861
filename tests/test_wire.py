"""The wire format: one legal file per state, and nothing but AdapterError for all others."""

import json
import math
from dataclasses import asdict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, load_file

from fedlora.adapter import AdapterSpec, AdapterState, LayerSpec
from fedlora.errors import AdapterError
from fedlora.messages import Broadcast, ClientUpdate, RoundPlan
from fedlora.wire import (
    MAX_MANIFEST_BYTES,
    MAX_TENSORS,
    decode_broadcast,
    decode_own,
    decode_part,
    decode_tensors,
    decode_update_manifest,
    encode_broadcast,
    encode_json,
    encode_tensors,
    encode_update,
    header,
    sha256,
)

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64]
GOLDEN = {
    "b.A": torch.tensor([[1.0, -2.0]]),
    "a.n": torch.tensor([3], dtype=torch.int64),
}
GOLDEN_HEADER = (
    b'{"a.n":{"dtype":"I64","shape":[1],"data_offsets":[0,8]},'
    b'"b.A":{"dtype":"F32","shape":[1,2],"data_offsets":[8,16]}}'
)


def shapes_of(tensors):
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def dtypes_of(tensors):
    return {name: tensor.dtype for name, tensor in tensors.items()}


def same_bits(left, right):
    return (
        left.keys() == right.keys()
        and shapes_of(left) == shapes_of(right)
        and dtypes_of(left) == dtypes_of(right)
        and all(
            left[k].contiguous().view(-1).view(torch.uint8).tolist()
            == right[k].contiguous().view(-1).view(torch.uint8).tolist()
            for k in left
            if left[k].numel()
        )
    )


@st.composite
def tensor_maps(draw):
    names = draw(
        st.lists(st.from_regex(r"[A-Za-z0-9._\-]{1,12}", fullmatch=True), max_size=4, unique=True)
    )
    tensors = {}
    for name in names:
        shape = draw(st.lists(st.integers(0, 3), max_size=3))
        dtype = draw(st.sampled_from(DTYPES))
        size = math.prod(shape) * dtype.itemsize
        raw = draw(st.binary(min_size=size, max_size=size))
        flat = torch.frombuffer(bytearray(raw), dtype=dtype) if raw else torch.empty(0, dtype=dtype)
        tensors[name] = flat.reshape(shape)
    return tensors


def test_bytes_equal_a_file_written_by_hand():
    """The safetensors format: u64 length, JSON padded with spaces, little-endian data."""
    padding = b" " * (-len(GOLDEN_HEADER) % 8)
    expected = (
        (len(GOLDEN_HEADER) + len(padding)).to_bytes(8, "little")
        + GOLDEN_HEADER
        + padding
        + bytes.fromhex("03000000000000000000803f000000c0")
    )
    assert encode_tensors(GOLDEN).hex() == expected.hex()


@given(tensor_maps())
def test_the_safetensors_library_reads_what_we_write(tensors):
    """Oracle: safetensors.torch.load."""
    assert same_bits(load(encode_tensors(tensors)), tensors)


def test_files_are_ordinary_safetensors_files(tmp_path):
    """Oracle: safetensors.torch.load_file."""
    path = tmp_path / "x.safetensors"
    path.write_bytes(encode_tensors(GOLDEN))
    assert same_bits(load_file(path), GOLDEN)


@given(tensor_maps(), st.randoms(use_true_random=False))
def test_insertion_order_changes_no_byte(tensors, random):
    names = list(tensors)
    random.shuffle(names)
    assert encode_tensors({name: tensors[name] for name in names}) == encode_tensors(tensors)


@given(tensor_maps())
def test_decoding_returns_the_very_bits(tensors):
    data = encode_tensors(tensors)
    assert same_bits(decode_tensors(data, shapes_of(tensors), dtypes_of(tensors)), tensors)
    assert same_bits(decode_own(data), tensors)


def test_views_are_written_as_they_look():
    matrix = torch.arange(6.0).reshape(2, 3)
    assert encode_tensors({"x": matrix.T}) == encode_tensors({"x": matrix.T.contiguous()})


def test_decoded_tensors_own_their_memory():
    data = bytearray(encode_tensors(GOLDEN))
    tensors = decode_tensors(data, shapes_of(GOLDEN), dtypes_of(GOLDEN))
    data[:] = bytes(len(data))
    assert same_bits(tensors, GOLDEN)


def test_every_change_of_one_header_byte_is_refused():
    data = encode_tensors(GOLDEN)
    end = len(header(shapes_of(GOLDEN), dtypes_of(GOLDEN)))
    for place in range(end):
        for flip in (1, 0x20, 0xFF):
            bad = bytearray(data)
            bad[place] ^= flip
            with pytest.raises(AdapterError, match="header differs"):
                decode_tensors(bytes(bad), shapes_of(GOLDEN), dtypes_of(GOLDEN))


def test_every_other_length_is_refused():
    data = encode_tensors(GOLDEN)
    others = [data[:size] for size in range(len(data))] + [data + b" ", data + data, b"\0" + data]
    for bad in others:
        with pytest.raises(AdapterError, match=f"{len(bad)} bytes; expected {len(data)}"):
            decode_tensors(bad, shapes_of(GOLDEN), dtypes_of(GOLDEN))


@pytest.mark.parametrize("name", ["", "a/b", "a b", "ä", "x" * 257, "\0", "a\n"])
def test_names_outside_the_alphabet_are_refused(name):
    with pytest.raises(AdapterError, match="is not allowed"):
        encode_tensors({name: torch.zeros(1)})


def test_other_dtypes_are_refused():
    with pytest.raises(AdapterError, match=r"has dtype torch\.bool"):
        encode_tensors({"x": torch.zeros(1, dtype=torch.bool)})


def test_more_tensors_than_the_limit_are_refused():
    shapes = {str(i): (1,) for i in range(MAX_TENSORS + 1)}
    with pytest.raises(AdapterError, match="the limit is 4096"):
        decode_tensors(b"", shapes)


def test_a_part_with_another_digest_is_refused():
    data = encode_tensors({"x": torch.zeros(2)})
    assert same_bits(decode_part(data, sha256(data), {"x": (2,)}), {"x": torch.zeros(2)})
    with pytest.raises(AdapterError, match="a part of the broadcast has digest"):
        decode_part(data, "0" * 64, {"x": (2,)})


def spec():
    return AdapterSpec("lora", 1, 2.0, (LayerSpec("x", 2, 2, 1, 2.0),), (), {}, "base", 0)


def update_manifest(**changes):
    delta = AdapterState(spec(), {"x.B": torch.zeros(2, 1)})
    update = ClientUpdate("run", 1, 0, "c", "s", delta, 7, {"train_loss": 0.5})
    return {**json.loads(encode_update(update)[0]), **changes}


def broadcast():
    plan = RoundPlan("run", 3, 1, "c", ("A", "B"), 4, 20, "keep")
    return Broadcast(plan, "spec", {"factor.A": "a" * 64, "factor.B": "b" * 64})


def broadcast_manifest(**plan):
    value = json.loads(encode_broadcast(broadcast()))
    value["plan"].update(plan)
    return value


def test_broadcast_round_trip():
    decoded = decode_broadcast(encode_broadcast(broadcast()))
    assert decoded == broadcast()
    assert decoded.start_sha256 == broadcast().start_sha256


def test_update_manifest_round_trip():
    fields = decode_update_manifest(encode_json(update_manifest()))
    assert fields == update_manifest()
    assert fields["num_examples"] == 7


HUGE = 10**400
DEEP = b"[" * 30_000 + b"]" * 30_000
HOSTILE_UPDATES = {
    "empty": b"",
    "not JSON": b"{",
    "not UTF-8": b'{"run":"\xff"}',
    "a list": b"[]",
    "a number": b"1e400",
    "nested deeply": DEEP,
    "nested deeply inside": b'{"run":' + DEEP + b"}",
    "repeated key": encode_json(update_manifest())[:-1] + b',"run":"run"}',
    "repeated metric": encode_json(update_manifest()).replace(
        b'"train_loss":0.5', b'"train_loss":0.5,"train_loss":0.5'
    ),
    "too large": encode_json(update_manifest(run="x" * MAX_MANIFEST_BYTES)),
    "NaN": encode_json(update_manifest()).replace(b":7", b":NaN"),
    "Infinity": encode_json(update_manifest()).replace(b":7", b":-Infinity"),
    "NaN metric": encode_json(update_manifest()).replace(b":0.5", b":NaN"),
    "infinite metric": encode_json(update_manifest()).replace(b":0.5", b":1e400"),
    "huge metric": encode_json(update_manifest(metrics={"x": HUGE})),
    "endless integer": encode_json(update_manifest()).replace(b":7", b":" + b"9" * 5000),
    "metric that is a list": encode_json(update_manifest(metrics={"x": [1]})),
    "metric that is true": encode_json(update_manifest(metrics={"x": True})),
    "metric with a strange name": encode_json(update_manifest(metrics={"a/b": 1})),
    "metric without a name": encode_json(update_manifest(metrics={"": 1})),
    "missing field": encode_json({k: v for k, v in update_manifest().items() if k != "run"}),
    "extra field": encode_json(update_manifest(extra=1)),
    "round is true": encode_json(update_manifest(round=True)),
    "round is a float": encode_json(update_manifest(round=1.0)),
    "round is a string": encode_json(update_manifest(round="1")),
    "client is null": encode_json(update_manifest(client=None)),
    "run is a list": encode_json(update_manifest(run=["run"])),
    "examples are true": encode_json(update_manifest(num_examples=True)),
    "examples are a string": encode_json(update_manifest(num_examples="7")),
    "metrics are a list": encode_json(update_manifest(metrics=[])),
}


@pytest.mark.parametrize("case", HOSTILE_UPDATES)
def test_hostile_update_manifests_are_refused(case):
    with pytest.raises(AdapterError):
        decode_update_manifest(HOSTILE_UPDATES[case])


HOSTILE_BROADCASTS = {
    "empty": b"",
    "nested deeply": DEEP,
    "round is a string": encode_json(broadcast_manifest(round="3")),
    "round is true": encode_json(broadcast_manifest(round=True)),
    "steps are a float": encode_json(broadcast_manifest(local_steps=1.5)),
    "steps are negative": encode_json(broadcast_manifest(local_steps=-1)),
    "rank is huge": encode_json(broadcast_manifest(rank=HUGE)),
    "rank is 0": encode_json(broadcast_manifest(rank=0)),
    "client is null": encode_json(broadcast_manifest(client=None)),
    "factors are a string": encode_json(broadcast_manifest(factors="AB")),
    "factors are numbers": encode_json(broadcast_manifest(factors=[1])),
    "factors are null": encode_json(broadcast_manifest(factors=None)),
    "unknown optimiser state": encode_json(broadcast_manifest(optimizer_state="x")),
    "unknown coding up": encode_json(broadcast_manifest(up="int2")),
    "unknown coding down": encode_json(broadcast_manifest(down="")),
    "a coding is a list": encode_json(broadcast_manifest(up=["int8"])),
    "top_k is 0": encode_json(broadcast_manifest(top_k=0)),
    "top_k above 1": encode_json(broadcast_manifest(top_k=1.5)),
    "top_k is true": encode_json(broadcast_manifest(top_k=True)),
    "feedback is 1": encode_json(broadcast_manifest(feedback=1)),
    "unknown plan field": encode_json(broadcast_manifest(extra=1)),
    "no factors": encode_json(
        {**broadcast_manifest(), "plan": {k: 1 for k in asdict(broadcast().plan) if k != "factors"}}
    ),
    "plan is a list": encode_json({**broadcast_manifest(), "plan": []}),
    "digests are lists": encode_json({**broadcast_manifest(), "parts": {"heads": []}}),
    "a digest is none": encode_json({**broadcast_manifest(), "parts": {"heads": "\ud800"}}),
    "a part's name is none": encode_json({**broadcast_manifest(), "parts": {"\ud800": "a" * 64}}),
    "digests are numbers": encode_json({**broadcast_manifest(), "parts": {"heads": 1}}),
}


@pytest.mark.parametrize("case", HOSTILE_BROADCASTS)
def test_hostile_broadcasts_are_refused(case):
    with pytest.raises(AdapterError):
        decode_broadcast(HOSTILE_BROADCASTS[case])


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)


@st.composite
def mutated_manifests(draw, valid):
    """A valid manifest with one value exchanged, or with some bytes exchanged."""
    value = json.loads(json.dumps(valid))
    if draw(st.booleans()):
        table = draw(st.sampled_from([value, *(v for v in value.values() if isinstance(v, dict))]))
        table[draw(st.sampled_from([*table, "other"]))] = draw(JSON_VALUES)
        return json.dumps(value).encode()
    data = bytearray(encode_json(value))
    for _ in range(draw(st.integers(1, 3))):
        data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
    return bytes(data)


def only_adapter_errors(decode, data):
    try:
        return decode(data)
    except AdapterError:
        return None


@settings(max_examples=300)
@given(st.binary(max_size=80) | mutated_manifests(update_manifest()))
def test_no_update_manifest_raises_anything_else(data):
    fields = only_adapter_errors(decode_update_manifest, data)
    assert fields is None or all(math.isfinite(v) for v in fields["metrics"].values())


@settings(max_examples=300)
@given(st.binary(max_size=80) | mutated_manifests(broadcast_manifest()))
def test_no_broadcast_raises_anything_else(data):
    decoded = only_adapter_errors(decode_broadcast, data)
    assert decoded is None or isinstance(decoded.start_sha256, str)


def with_header(text: bytes, data: bytes = b"") -> bytes:
    return len(text).to_bytes(8, "little") + text + data


def entry(dtype="F32", shape=(1,), offsets=(0, 4)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


GARBAGE = {
    "nothing": b"",
    "short": b"\x01",
    "length beyond the end": b"\xff" * 8,
    "nested deeply": with_header(DEEP),
    "a list": with_header(b"[]"),
    "metadata": with_header(b'{"__metadata__":{"a":"b"}}'),
    "shape is a string": with_header(encode_json({"x": {**entry(), "shape": "ab"}})),
    "shape is a number": with_header(encode_json({"x": {**entry(), "shape": 3}})),
    "shape is nested": with_header(encode_json({"x": entry(shape=[[1]])})),
    "shape is negative": with_header(
        b'{"x":{"dtype":"F32","shape":[-1,-1],"data_offsets":[0,4]}}      ', bytes(4)
    ),
    "shape is a float": with_header(
        b'{"x":{"dtype":"F32","shape":[1.0],"data_offsets":[0,4.0]}}      ', bytes(4)
    ),
    "shape is true": with_header(
        b'{"x":{"dtype":"F32","shape":[true],"data_offsets":[0,4]}}       ', bytes(4)
    ),
    "shape is huge and empty": with_header(
        b'{"x":{"dtype":"F32","shape":[0,1208925819614629174706176],"data_offsets":[0,0]}}'
    ),
    "dtype is a list": with_header(encode_json({"x": {**entry(), "dtype": []}})),
    "dtype is unknown": with_header(encode_json({"x": entry("F8")})),
}


@pytest.mark.parametrize("case", GARBAGE)
def test_garbage_files_are_refused(case):
    data = GARBAGE[case]
    size = int.from_bytes(data[:8], "little")
    if size < 200:
        # as the canonical header is: padded to 8 bytes, so that only the shape is at fault
        text = data[8 : 8 + size].rstrip()
        data = with_header(text + b" " * (-len(text) % 8), data[8 + size :])
    with pytest.raises(AdapterError):
        decode_own(data)


@pytest.mark.parametrize("length", ["true", "1.0"])
def test_a_refused_file_does_not_change_what_is_legal(length):
    """1 == True == 1.0, so a cache by shape must not confuse them."""
    text = b'{"y":{"dtype":"F32","shape":[%s],"data_offsets":[0,4]}}' % length.encode()
    with pytest.raises(AdapterError):
        decode_own(with_header(text + b" " * (-len(text) % 8), bytes(4)))
    data = encode_tensors({"y": torch.zeros(1)})
    assert b'"shape":[1]' in data
    assert same_bits(decode_own(data), {"y": torch.zeros(1)})


@st.composite
def mutated_files(draw):
    data = bytearray(encode_tensors(GOLDEN))
    for _ in range(draw(st.integers(1, 3))):
        data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
    return bytes(data)


@settings(max_examples=300)
@given(st.binary(max_size=80) | st.binary(max_size=60).map(with_header) | mutated_files())
def test_no_file_raises_anything_else(data):
    tensors = only_adapter_errors(decode_own, data)
    assert tensors is None or encode_tensors(tensors) == data
