"""Identities from the papers, one method at a time."""

import math

import pytest
import torch

from fedlora.adapters.bone import bone_row_delta, recover_weight
from fedlora.adapters.inject import adapt
from fedlora.adapters.leaves import bone_col_delta
from fedlora.errors import AdapterError
from tests.adapters import dense
from tests.adapters.cases import Case, Net, adapted, draw, factor_tensors, linear, only_layer

torch.set_num_threads(1)

BONE = pytest.mark.parametrize("by_row", [False, True], ids=["col", "row"])
SHAPES = pytest.mark.parametrize("shape", [(12, 8), (8, 12), (10, 7), (7, 10)], ids=str)


def bone_delta(weight, blocks, by_row):
    return bone_row_delta(weight, blocks) if by_row else bone_col_delta(weight, blocks)


def bone_blocks(d, k, b, by_row, seed=5):
    return 0.3 * draw(math.ceil((k if by_row else d) / b), b, b, seed=seed, dtype=torch.float64)


@BONE
@SHAPES
def test_bone_change_is_the_block_loop(shape, by_row):
    weight = draw(*shape, dtype=torch.float64)
    blocks = bone_blocks(*shape, 4, by_row)
    torch.testing.assert_close(
        bone_delta(weight, blocks, by_row), dense.bone(weight, blocks, by_row)
    )


@BONE
@SHAPES
def test_bone_on_a_zero_base_tiles_its_blocks(shape, by_row):
    d, k = shape
    blocks = bone_blocks(d, k, 4, by_row)
    delta = bone_delta(torch.zeros(d, k, dtype=torch.float64), blocks, by_row)
    for o in range(d):
        for c in range(k):
            assert delta[o, c] == blocks[c // 4 if by_row else o // 4, o % 4, c % 4]


@BONE
def test_bone_with_scaled_identity_blocks(by_row):
    """B = c I gives c (W_ij + I)."""
    weight = draw(12, 8, dtype=torch.float64)
    eye = torch.eye(4, dtype=torch.float64)
    blocks = 0.7 * eye.expand(2 if by_row else 3, 4, 4)
    expected = 0.7 * (weight + eye.repeat(3, 2))
    torch.testing.assert_close(bone_delta(weight, blocks, by_row), expected)


@BONE
@SHAPES
def test_bone_base_is_recovered_by_the_inverse(shape, by_row):
    weight = draw(*shape)
    blocks = bone_blocks(*shape, 4, by_row).float()
    merged = weight + bone_delta(weight, blocks, by_row)
    torch.testing.assert_close(
        recover_weight(merged, blocks, by_row=by_row), weight, rtol=1e-4, atol=1e-4
    )


@BONE
def test_bone_inverse_fails_loudly_when_singular(by_row):
    weight = draw(8, 8)
    blocks = torch.zeros(2, 4, 4)
    blocks[1, 2, 2] = -1.0
    merged = weight + bone_delta(weight, blocks, by_row)
    with pytest.raises(AdapterError, match="singular"):
        recover_weight(merged, blocks, by_row=by_row)


@pytest.mark.parametrize("method", ["bone-col", "bone-row"])
def test_bone_change_has_full_rank(method):
    delta = only_layer(adapted(Case(method, rank=2), 12, 8, dtype=torch.float64)).delta_weight()
    assert torch.linalg.matrix_rank(delta) == 8


@pytest.mark.parametrize("shape", [(12, 8), (8, 12), (10, 7)], ids=str)
def test_miss_is_lora_with_a_frozen_indicator(shape):
    """Change D T with T[a, c] = 1 where c mod r = a; its rank is at most r."""
    d, k = shape
    model = adapted(Case("miss", rank=3), d, k)
    factor = factor_tensors(model)["D"]
    indicator = torch.zeros(3, k)
    for c in range(k):
        indicator[c % 3, c] = 1.0
    delta = only_layer(model).delta_weight()
    torch.testing.assert_close(delta, factor @ indicator)
    assert torch.linalg.matrix_rank(delta) <= 3


def test_miss_mini_of_full_height_is_miss():
    plain = adapted(Case("miss"), 12, 8)
    mini = adapted(Case("miss", options={"r2": 12}), 12, 8)
    mini.load(plain.state().tensors)
    x = draw(3, 8)
    torch.testing.assert_close(only_layer(mini)(x), only_layer(plain)(x))


def test_rslora_is_lora_with_a_larger_alpha():
    models = [
        adapt(
            Net(linear(12, 8)),
            method=method,
            rank=4,
            alpha=alpha,
            targets="all-linear",
            heads=(),
            base_fingerprint="",
            seed=1,
        )
        for method, alpha in (("rslora", 8.0), ("lora", 8.0 * math.sqrt(4)))
    ]
    state = {"layers.0.B": draw(12, 4)}
    for model in models:
        model.load(state)
    x = draw(3, 8)
    torch.testing.assert_close(*[only_layer(model)(x) for model in models])


@pytest.mark.parametrize("conv1d", [False, True])
def test_dora_starts_at_the_row_norms_and_merges_to_them(conv1d):
    model = adapted(Case("dora"), random=False, conv1d=conv1d)
    layer = only_layer(model)
    torch.testing.assert_close(layer.m.weight.detach(), layer.weight.norm(dim=1))
    model = adapted(Case("dora"), conv1d=conv1d)
    layer = only_layer(model)
    merged = layer.weight + layer.delta_weight()
    torch.testing.assert_close(merged.norm(dim=1), layer.m.weight.abs())


def test_dora_keeps_rows_of_zeros_finite():
    base = linear(6, 5)
    base.weight.data[2] = 0.0
    model = adapt(
        Net(base),
        method="dora",
        rank=2,
        alpha=4.0,
        targets="all-linear",
        heads=(),
        base_fingerprint="",
        seed=1,
    )
    layer = only_layer(model)
    x = draw(3, 5)
    y = layer(x)
    torch.testing.assert_close(y, base(x))
    y.sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.factors().values())
