"""The gate: every malformed update is refused with its code, every well-formed one gets in."""

import math

import pytest
import torch

from fedlora.errors import UpdateRejected
from fedlora.server.admission import Limits, admit, expected_size
from fedlora.wire import encode_json, encode_tensors, sha256
from tests.server.cases import encoded, expectation, honest, make_spec

LIMITS = Limits(max_update_norm=100.0, max_examples=1e7)
EXPECTED = expectation()
UPDATE = honest(EXPECTED)
DELTA = dict(UPDATE.delta.tensors)
FIRST = "p.A"


def rejection(manifest, payload, limits=LIMITS):
    with pytest.raises(UpdateRejected) as caught:
        admit(manifest, payload, EXPECTED, limits)
    assert caught.value.client == "ann"
    assert caught.value.detail
    assert caught.value.exit_code == 2
    return caught.value.code


def filled(value):
    tensor = DELTA[FIRST].clone()
    tensor[0, 0] = value
    return encoded(UPDATE, {**DELTA, FIRST: tensor})


def test_an_honest_update_comes_through_unchanged():
    update = admit(*encoded(UPDATE), EXPECTED, LIMITS)
    assert update.delta.spec == EXPECTED.spec
    assert update.delta.tensors.keys() == DELTA.keys()
    assert all(torch.equal(update.delta.tensors[k], DELTA[k]) for k in DELTA)
    assert (update.weight, update.num_examples, update.metrics) == (10.0, 10.0, UPDATE.metrics)
    assert all(
        torch.equal(v, EXPECTED.start.tensors[k].double() + DELTA[k].double())
        for k, v in update.trained.items()
    )


def test_uniform_weighting_ignores_the_claimed_examples():
    limits = Limits(LIMITS.max_update_norm, LIMITS.max_examples, uniform=True)
    assert admit(*encoded(UPDATE, num_examples=123), EXPECTED, limits).weight == 1.0


def test_a_zero_update_is_accepted():
    update = admit(
        *encoded(UPDATE, {k: torch.zeros_like(v) for k, v in DELTA.items()}), EXPECTED, LIMITS
    )
    assert not any(v.any() for v in update.delta.tensors.values())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_refused(value):
    assert rejection(*filled(value)) == "NOT_FINITE"


@pytest.mark.parametrize("value", [1e30, -3.4e38, 101.0])
def test_a_norm_above_the_cap_is_refused(value):
    assert rejection(*filled(value)) == "NORM"


def test_the_norm_runs_over_all_tensors():
    """sqrt(number of entries) * 1: just inside the cap, then just outside."""
    ones = {k: torch.ones_like(v) for k, v in DELTA.items()}
    norm = math.sqrt(sum(v.numel() for v in ones.values()))
    admit(*encoded(UPDATE, ones), EXPECTED, Limits(norm * 1.0001, 1e7))
    assert rejection(*encoded(UPDATE, ones), Limits(norm * 0.9999, 1e7)) == "NORM"


def test_a_missing_tensor_is_refused():
    assert rejection(*encoded(UPDATE, {k: v for k, v in DELTA.items() if k != FIRST})) == "SIZE"


def test_an_extra_tensor_is_refused():
    assert rejection(*encoded(UPDATE, {**DELTA, "p.C": torch.zeros(1)})) == "SIZE"


def test_an_extra_empty_tensor_is_refused():
    assert rejection(*encoded(UPDATE, {**DELTA, "p.C": torch.zeros(0)})) == "SIZE"


def test_a_larger_tensor_is_refused():
    assert rejection(*encoded(UPDATE, {**DELTA, FIRST: torch.zeros(4, 5)})) == "SIZE"


def test_a_transposed_tensor_is_refused():
    """Same bytes, same length of the header, other shape."""
    assert rejection(*encoded(UPDATE, {**DELTA, FIRST: DELTA[FIRST].T})) == "HEADER"


def test_a_renamed_tensor_is_refused():
    other = {k: v for k, v in DELTA.items() if k != FIRST}
    assert rejection(*encoded(UPDATE, {**other, "p.a": DELTA[FIRST]})) == "HEADER"


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16, torch.int64])
def test_another_dtype_is_refused(dtype):
    assert rejection(*encoded(UPDATE, {k: v.to(dtype) for k, v in DELTA.items()})) == "SIZE"


def test_another_dtype_of_the_same_size_is_refused():
    payload = encode_tensors(DELTA).replace(b'"F32"', b'"I32"')
    assert rejection(*reencoded(payload)) == "HEADER"


def reencoded(payload):
    manifest, _ = encoded(UPDATE, sha256=sha256(payload), size_bytes=len(payload))
    return manifest, payload


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("run", "other"),
        ("round", 2),
        ("round", 4),
        ("attempt", 0),
        ("start_sha256", "other"),
        ("run", "x" * 50_000),
    ],
)
def test_an_update_of_another_round_is_stale(field, value):
    assert rejection(*encoded(UPDATE, **{field: value})) == "STALE"


def test_a_rejection_does_not_repeat_a_long_field():
    """What a peer sends must not fill the server's records."""
    with pytest.raises(UpdateRejected) as caught:
        admit(*encoded(UPDATE, run="x" * 50_000), EXPECTED, LIMITS)
    assert len(str(caught.value)) < 1000


def test_an_update_in_the_name_of_another_client_is_refused():
    assert rejection(*encoded(UPDATE, client="bob")) == "CLIENT"


def test_another_base_is_refused():
    assert rejection(*encoded(UPDATE, base_fingerprint="other")) == "SPEC"


@pytest.mark.parametrize(
    "spec", [make_spec(rank=1), make_spec(scale=1.0), make_spec("rslora"), make_spec(heads=False)]
)
def test_another_adapter_is_refused(spec):
    assert rejection(*encoded(UPDATE, spec=spec.digest())) == "SPEC"


def test_another_digest_or_length_is_refused():
    assert rejection(*encoded(UPDATE, sha256="0" * 64)) == "DIGEST"
    assert rejection(*encoded(UPDATE, size_bytes=1)) == "DIGEST"
    manifest, payload = encoded(UPDATE)
    changed = bytearray(payload)
    changed[-1] ^= 1
    assert rejection(manifest, bytes(changed)) == "DIGEST"


@pytest.mark.parametrize("examples", [-1, 0, -0.0, 1e15, 10**15, 1e7 * 1.001])
def test_a_claim_of_examples_out_of_bounds_is_refused(examples):
    assert rejection(*encoded(UPDATE, num_examples=examples)) == "WEIGHT"


@pytest.mark.parametrize("text", [b"NaN", b"Infinity", b"true", b'"9"', b"null", b"1" + b"0" * 400])
def test_a_claim_of_examples_that_is_no_number_is_refused(text):
    manifest, payload = encoded(UPDATE, num_examples=12345)
    assert rejection(manifest.replace(b"12345", text), payload) == "MANIFEST"


def test_a_claim_that_overflows_to_infinity_is_refused():
    manifest, payload = encoded(UPDATE, num_examples=12345)
    assert rejection(manifest.replace(b"12345", b"1e400"), payload) == "WEIGHT"


@pytest.mark.parametrize("text", [b"NaN", b"-Infinity", b"1e400", b"[]", b"9" * 400])
def test_metrics_that_are_not_finite_are_refused(text):
    manifest, payload = encoded(UPDATE, metrics={"train_loss": 12345})
    assert rejection(manifest.replace(b"12345", text), payload) == "MANIFEST"


@pytest.mark.parametrize("manifest", [b"", b"null", b"\xff", encode_json({"run": "run"})])
def test_other_manifests_are_refused(manifest):
    assert rejection(manifest, encoded(UPDATE)[1]) == "MANIFEST"


def test_expected_size_is_that_of_the_encoded_file():
    assert expected_size(EXPECTED.shapes) == len(encode_tensors(DELTA))
