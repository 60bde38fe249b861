"""The gate for packed updates: masks and payload must say the same, within the budget."""

from dataclasses import replace

import pytest
import torch

from fedlora.adapter import AdapterState
from fedlora.adapters.slots import pack, unpack
from fedlora.errors import UpdateRejected
from fedlora.server.admission import Limits, admit
from fedlora.wire import decode_update_manifest, encode_tensors
from tests.server.cases import encoded, expectation, honest, make_spec

LIMITS = Limits(max_update_norm=100.0, max_examples=1e7)
SPEC = make_spec(rank=3)
# two layers of rank 3; three slots may come
EXPECTED = replace(expectation(SPEC, ["B"]), slots=3, factors=("B",))
MASKS = (0b101, 0b010)


def an_update(masks=MASKS, expected=EXPECTED):
    whole = honest(expected)
    packed = pack(whole.delta.tensors, SPEC, ["B"], masks)
    return replace(whole, delta=AdapterState(SPEC, packed), slots=masks), whole


def rejection(manifest, payload, expected=EXPECTED):
    with pytest.raises(UpdateRejected) as caught:
        admit(manifest, payload, expected, LIMITS)
    return caught.value.code, caught.value.detail


@pytest.mark.parametrize("masks", [MASKS, (0b111, 0), (0, 0b001), (0, 0), (0b011, 0b100)])
def test_a_packed_update_arrives_at_full_rank(masks):
    """Also with fewer slots than the budget, or none but the heads."""
    update, whole = an_update(masks)
    found = admit(*encoded(update), EXPECTED, LIMITS)
    assert found.slots == masks
    expected = unpack(update.delta.tensors, SPEC, ["B"], masks)
    assert found.delta.tensors.keys() == whole.delta.tensors.keys()
    assert all(torch.equal(found.delta.tensors[k], v) for k, v in expected.items())


def test_without_heads_an_update_may_be_empty():
    spec = make_spec(rank=3, heads=False)
    expected = replace(expectation(spec, ["B"]), slots=3, factors=("B",))
    update = replace(honest(expected), delta=AdapterState(spec, {}), slots=(0, 0))
    found = admit(*encoded(update), expected, LIMITS)
    assert not any(bool(t.any()) for t in found.delta.tensors.values())


@pytest.mark.parametrize(
    ("masks", "detail"),
    [
        ([], "0 slot masks; expected one for each of 2 layers"),
        (["5"], "1 slot masks"),
        (["1", "1", "1"], "3 slot masks"),
        (["8", "0"], "layer p has rank 3, its slot mask is 8"),
        (["0", "f" * 1000], "layer q has rank 3"),
        (["7", "1"], "4 slots; expected at most 3"),
        (["7", "7"], "6 slots"),
        (None, "names no rank slots"),
    ],
)
def test_masks_that_are_not_allowed_are_refused(masks, detail):
    manifest, payload = encoded(an_update()[0], slots=masks)
    code, found = rejection(manifest, payload)
    assert code == "SLOTS"
    assert detail in found
    assert len(found) < 2000


@pytest.mark.parametrize("masks", [[], ["1", "0"], ["0", "0"]])
def test_masks_that_nobody_asked_for_are_refused(masks):
    expected = expectation(SPEC, ["B"])
    manifest, payload = encoded(honest(expected), slots=masks)
    code, detail = rejection(manifest, payload, expected)
    assert (code, detail) == ("SLOTS", "names rank slots without being asked")


@pytest.mark.parametrize(
    "masks", [["-1", "0"], ["0x1", "0"], [1, 0], ["", "0"], ["g", "0"], "5", 5]
)
def test_masks_that_are_no_hexadecimal_numbers_are_refused(masks):
    assert rejection(*encoded(an_update()[0], slots=masks))[0] == "MANIFEST"


def test_masks_without_a_bound_are_refused_before_they_are_parsed():
    assert rejection(*encoded(an_update()[0], slots=["f" * 10_000, "0"]))[0] == "MANIFEST"


@pytest.mark.parametrize("masks", [("1", "2"), ("5", "0"), ("0", "2"), ("5", "6"), ("0", "0")])
def test_a_payload_of_other_slots_than_the_masks_say_is_refused(masks):
    """More or fewer slots than there are columns, or in another layer."""
    assert rejection(*encoded(an_update()[0], slots=list(masks)))[0] in ("HEADER", "SLOTS")


def test_another_layer_with_equal_counts_is_refused():
    """p is (6, .) and q is (4, .): one column of each instead of two of p has other shapes."""
    manifest, payload = encoded(an_update((0b11, 0))[0], slots=["1", "1"])
    assert rejection(manifest, payload)[0] == "HEADER"


def test_a_dense_payload_in_place_of_a_packed_one_is_refused():
    _, whole = an_update()
    manifest, payload = encoded(whole, slots=["5", "2"])
    assert rejection(manifest, payload)[0] == "HEADER"
    assert rejection(*encoded(whole))[0] == "SLOTS"


def test_a_payload_above_full_rank_is_refused_by_its_size():
    update, _ = an_update()
    grown = {**update.delta.tensors, "p.B": torch.zeros(6, 40)}
    assert rejection(*encoded(update, grown))[0] == "SIZE"


def test_values_of_packed_slots_are_checked_too():
    update, _ = an_update()
    tensors = dict(update.delta.tensors)
    for value, code in ((float("nan"), "NOT_FINITE"), (1e30, "NORM")):
        broken = tensors["p.B"].clone()
        broken[0, 0] = value
        assert rejection(*encoded(update, {**tensors, "p.B": broken}))[0] == code


def test_masks_are_sent_as_hexadecimal_digits():
    manifest, payload = encoded(an_update((0b101, 0b010))[0])
    assert b'"slots":["5","2"]' in manifest
    assert decode_update_manifest(manifest)["slots"] == (5, 2)
    assert payload == encode_tensors(an_update()[0].delta.tensors)
