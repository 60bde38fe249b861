"""Packed rank slots against plain indexing."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from fedlora.adapter import AdapterSpec, LayerSpec, trained_shapes
from fedlora.adapters import METHODS
from fedlora.adapters.slots import indices, pack, packed_shapes, slot_mask, top_slots, unpack
from fedlora.wire import decode_tensors, encode_tensors, layout
from tests.server.cases import randn


@st.composite
def cases(draw):
    """(spec, factor, masks, tensors at full rank): layers of any shapes and ranks."""
    sizes = st.tuples(st.integers(1, 6), st.integers(1, 6), st.integers(1, 5))
    layers = tuple(
        LayerSpec(f"l{i}", d, k, r, 1.0)
        for i, (d, k, r) in enumerate(draw(st.lists(sizes, min_size=1, max_size=4)))
    )
    heads = {"head.weight": (2, 3)} if draw(st.booleans()) else {}
    rank = max(layer.rank for layer in layers)
    spec = AdapterSpec("lora", rank, rank, layers, tuple(heads), heads, "base", 0)
    masks = tuple(draw(st.integers(0, 2**layer.rank - 1)) for layer in layers)
    factor = draw(st.sampled_from("AB"))
    shapes = trained_shapes(spec, METHODS["lora"], [factor])
    tensors = {name: randn(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}
    return spec, factor, masks, tensors


@given(cases())
def test_packing_and_unpacking_leaves_the_chosen_slots_and_zeros(case):
    spec, factor, masks, tensors = case
    packed = pack(tensors, spec, [factor], masks)
    assert {k: tuple(v.shape) for k, v in packed.items()} == packed_shapes(spec, [factor], masks)
    found = unpack(packed, spec, [factor], masks)
    assert found.keys() == tensors.keys()
    for layer, mask in zip(spec.layers, masks, strict=True):
        name = f"{layer.name}.{factor}"
        for slot in range(layer.rank):
            pick = (slice(None), slot) if factor == "B" else slot
            expected = tensors[name][pick] if mask >> slot & 1 else 0 * tensors[name][pick]
            assert torch.equal(found[name][pick], expected)
        frozen = tensors[name] * slot_mask(tensors[name].shape, factor, mask)
        assert torch.equal(frozen, found[name])
    assert all(torch.equal(found[name], tensors[name]) for name in spec.head_shapes)
    again = pack(found, spec, [factor], masks)
    assert all(torch.equal(again[name], packed[name]) for name in packed)


@given(cases())
def test_packed_tensors_travel_and_are_never_larger(case):
    spec, factor, masks, tensors = case
    data = encode_tensors(pack(tensors, spec, [factor], masks))
    found = decode_tensors(data, packed_shapes(spec, [factor], masks))
    assert encode_tensors(found) == data
    assert len(data) <= layout(trained_shapes(spec, METHODS["lora"], [factor])).total


def a_spec(ranks):
    layers = tuple(LayerSpec(f"l{i}", 4, 4, rank, 1.0) for i, rank in enumerate(ranks))
    return AdapterSpec("lora", max(ranks), 1.0, layers, (), {}, "base", 0)


@given(
    st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=5), min_size=1, max_size=4), st.data()
)
def test_the_best_slots_of_all_layers_win_and_ties_go_to_the_first(rows, data):
    """Small integers as scores, so that there are many ties."""
    spec = a_spec([len(row) for row in rows])
    scores = {f"l{i}": torch.tensor(row, dtype=torch.float64) for i, row in enumerate(rows)}
    budget = data.draw(st.integers(1, sum(len(row) for row in rows)))
    masks = top_slots(scores, spec, budget)
    chosen = {(i, slot) for i, mask in enumerate(masks) for slot in indices(mask, len(rows[i]))}
    assert len(chosen) == budget
    everything = [(i, slot) for i, row in enumerate(rows) for slot in range(len(row))]
    for inside in chosen:
        for outside in set(everything) - chosen:
            better, worse = rows[inside[0]][inside[1]], rows[outside[0]][outside[1]]
            assert better > worse or (better == worse and inside < outside)
