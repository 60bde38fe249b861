"""The gate for coded updates, and the server's adapter where broadcasts are rounded."""

from dataclasses import replace

import pytest
import torch

from fedlora.adapter import AdapterState
from fedlora.adapters.slots import pack, unpack
from fedlora.compress import compress, round_trip
from fedlora.errors import UpdateRejected
from fedlora.messages import CONTROL, Coding, Compression
from fedlora.server.admission import Limits, admit, expected_size
from fedlora.wire import encode_coded, encode_tensors
from tests.server.cases import encoded, expectation, honest, make_spec, random_state
from tests.server.toy import Run

LIMITS = Limits(max_update_norm=100.0, max_examples=1e7)
CODINGS = [Coding("bf16"), Coding("int8"), Coding("int4"), Coding("none", 0.2), Coding("int4", 0.3)]
every = pytest.mark.parametrize("coding", CODINGS, ids=lambda c: f"{c.scheme}-{c.top_k:g}")


def coded(coding, **changes):
    expected = expectation(**changes)
    size = expected_size(expected.shapes, coding)
    return replace(expected, coding=coding, size_bytes=size)


def rejection(manifest, payload, expected, limits=LIMITS):
    with pytest.raises(UpdateRejected) as caught:
        admit(manifest, payload, expected, limits)
    return caught.value.code


@every
def test_what_is_admitted_is_what_the_client_knows_was_sent(coding):
    expected = coded(coding)
    update = replace(honest(expected), coding=coding)
    found = admit(*encoded(update), expected, LIMITS).delta.tensors
    sent = round_trip(update.delta.tensors, coding)
    assert found.keys() == expected.shapes.keys()
    assert all(torch.equal(found[name], sent[name]) for name in sent)


@every
def test_control_variates_are_coded_alike(coding):
    plain = expectation()
    shapes = {**plain.shapes, **{CONTROL + k: v for k, v in plain.shapes.items()}}
    expected = replace(
        plain, shapes=shapes, coding=coding, size_bytes=expected_size(shapes, coding)
    )
    change = honest(plain, seed=5).delta.tensors
    update = replace(honest(plain), coding=coding, control=change)
    found = admit(*encoded(update), expected, LIMITS).control
    assert all(torch.equal(found[k], v) for k, v in round_trip(change, coding).items())


@every
@pytest.mark.parametrize("masks", [(0b101, 0b010), (0b111, 0), (0, 0)])
def test_rank_slots_are_coded_as_they_are_packed(coding, masks):
    spec = make_spec(rank=3)
    whole = coded(coding, spec=spec, factors=["B"])
    expected = replace(whole, slots=3, factors=("B",))
    packed = pack(honest(expected).delta.tensors, spec, ["B"], masks)
    update = replace(honest(expected), delta=AdapterState(spec, packed), slots=masks, coding=coding)
    found = admit(*encoded(update), expected, LIMITS).delta.tensors
    sent = unpack(round_trip(packed, coding), spec, ["B"], masks)
    assert all(torch.equal(found[name], sent[name]) for name in sent)


@every
def test_an_update_in_another_coding_is_refused(coding):
    expected = coded(coding)
    for other in [Coding(), *CODINGS]:
        if other != coding:
            update = replace(honest(expected), coding=other)
            assert rejection(*encoded(update), expected) == "SIZE"


@every
def test_one_byte_of_the_header_is_refused(coding):
    expected = coded(coding)
    arrays = compress(honest(expected).delta.tensors, coding)
    renamed = {name.replace("values", "vaLues"): array for name, array in arrays.items()}
    assert rejection(*encoded(honest(expected), renamed), expected) == "HEADER"


def test_a_code_that_no_encoder_makes_is_refused_as_such():
    expected = coded(Coding("int8"))
    arrays = compress(honest(expected).delta.tensors, expected.coding)
    arrays["scale"][0] = float("nan")
    assert rejection(*encoded(honest(expected), arrays), expected) == "CODE"


@pytest.mark.parametrize("coding", [Coding("bf16"), Coding("none", 0.2)])
def test_a_value_that_is_not_finite_is_refused(coding):
    expected = coded(coding)
    arrays = compress(honest(expected).delta.tensors, coding)
    arrays["values"][3] = float("inf")
    assert rejection(*encoded(honest(expected), arrays), expected) == "NOT_FINITE"


@every
def test_the_norm_is_that_of_what_arrives(coding):
    expected = coded(coding)
    update = replace(honest(expected), coding=coding)
    tensors = round_trip(update.delta.tensors, coding).values()
    norm = sum(float((t.double() ** 2).sum()) for t in tensors) ** 0.5
    admit(*encoded(update), expected, Limits(norm * 1.0001, 1e7))
    assert rejection(*encoded(update), expected, Limits(norm * 0.9999, 1e7)) == "NORM"


def test_a_scale_may_not_carry_a_value_out_of_range():
    """Codes and scale are legal, their product is no float32."""
    expected = coded(Coding("int8"))
    arrays = compress(honest(expected).delta.tensors, expected.coding)
    arrays["scale"][:] = 3e38
    assert rejection(*encoded(honest(expected), arrays), expected) == "NOT_FINITE"


@pytest.mark.parametrize("down", ["bf16", "int8"])
def test_changes_that_are_small_beside_the_rounding_of_broadcasts_add_up(tmp_path, down):
    """Had the server begun from the rounded adapter, round after round would be lost."""
    rounds, step = 20, 1e-5
    run = Run(
        tmp_path / "run",
        rounds=rounds,
        compression=Compression(down=Coding(down)),
    )
    run.link.change = lambda update: replace(
        update,
        delta=AdapterState(
            update.delta.spec,
            {name: torch.full_like(t, step) for name, t in update.delta.tensors.items()},
        ),
    )
    end = run.go().tensors
    for name, begun in random_state(run.spec).tensors.items():
        moved = end[name].double() - begun.double()
        # every round rounds the state to float32 once
        torch.testing.assert_close(
            moved, torch.full_like(moved, rounds * step), rtol=0, atol=rounds * 2.0**-24
        )


@pytest.mark.parametrize("down", ["bf16", "int8"])
def test_parts_are_the_coded_factors(tmp_path, down):
    run = Run(tmp_path / "run", rounds=1, compression=Compression(down=Coding(down)))
    seen = []
    exchange = run.link.exchange

    def tap(tasks, parts, deadline_s):
        seen.append(dict(parts))
        return exchange(tasks, parts, deadline_s)

    run.link.exchange = tap
    run.go()
    tensors = random_state(run.spec).tensors
    factors = [{k: v for k, v in tensors.items() if k.endswith(f".{f}")} for f in "AB"]
    heads = {k: v for k, v in tensors.items() if k.startswith("head")}
    expected = {encode_coded(part, Coding(down)) for part in (*factors, heads)}
    assert set(seen[0].values()) == expected
    assert encode_tensors(heads) not in expected
