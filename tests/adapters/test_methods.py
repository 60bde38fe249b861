"""What every adapter method must do; the oracle is the dense float64 reference."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from fedlora.adapters.inject import AdaptedModel
from tests.adapters import dense
from tests.adapters.cases import CASES, SHAPES, adapted, draw, factor_tensors, only_layer

torch.set_num_threads(1)

every_case = pytest.mark.parametrize("case", CASES, ids=str)
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def reference(model: AdaptedModel) -> torch.Tensor:
    layer = only_layer(model)
    return dense.delta(
        model.spec.method, layer.layer, layer.weight.detach(), factor_tensors(model), model.basis
    )


def inputs(k: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return [
        draw(5, k, seed=11, dtype=dtype),
        draw(2, 3, k, seed=12, dtype=dtype),
        draw(2, 3, 2, k, seed=13, dtype=dtype),
    ]


@every_case
@every_shape
@pytest.mark.parametrize("kind", ["linear", "no-bias", "conv1d"])
def test_change_and_output_equal_the_dense_reference(case, shape, kind):
    d, k = shape
    model = adapted(case, d, k, bias=kind != "no-bias", conv1d=kind == "conv1d")
    layer = only_layer(model)
    change = reference(model)
    assert change.norm() > 0.1
    torch.testing.assert_close(layer.delta_weight().double(), change, rtol=1e-5, atol=1e-5)
    bias = 0.0 if layer.bias is None else layer.bias.double()
    for x in inputs(k):
        expected = x.double() @ (layer.weight.double() + change).T + bias
        torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-5)


@every_case
@every_shape
def test_lowrank_factors_multiply_to_the_change(case, shape):
    model = adapted(case, *shape)
    product = only_layer(model).lowrank()
    if product is None:
        assert case.method in ("dora", "bone-col", "bone-row")
        return
    left, right = product
    torch.testing.assert_close((left @ right).double(), reference(model), rtol=1e-5, atol=1e-5)
    assert left.shape[1] == (2 * case.rank if case.method == "pissa" else case.rank)


@every_case
@pytest.mark.parametrize("conv1d", [False, True])
def test_merged_output_equals_unmerged_and_base_returns_bit_for_bit(case, conv1d):
    model = adapted(case, 12, 8, conv1d=conv1d)
    layer = only_layer(model)
    before = layer.stored_weight.detach().clone()
    for x in inputs(8):
        unmerged = layer(x)
        with model.merged():
            assert not torch.equal(layer.stored_weight, before)
            torch.testing.assert_close(layer(x), unmerged, rtol=1e-5, atol=1e-5)
        assert torch.equal(layer.stored_weight, before)


@every_case
@every_shape
def test_starts_as_the_base_function(case, shape):
    d, k = shape
    # R of LoRA-XS starts at size 1e-5, not at zero
    almost = 1e-3 if case.method == "lora-xs" else 1e-6
    model = adapted(case, d, k, random=False)
    layer = only_layer(model)
    for x in inputs(k):
        with model.base_only():
            base = layer(x)
        torch.testing.assert_close(layer(x), base, rtol=almost, atol=almost)
    assert layer.delta_weight().abs().max() < almost


@every_case
def test_trains_its_factors_and_nothing_else(case):
    model = adapted(case, 12, 8)
    layer = only_layer(model)
    shapes = model.method.factor_shapes(model.spec.layers[0])
    assert {name: tuple(p.shape) for name, p in layer.factors().items()} == shapes
    trained = {id(p) for p in layer.factors().values()}
    for name, parameter in model.model.named_parameters():
        assert parameter.requires_grad == (id(parameter) in trained), name
    before = {k: v.clone() for k, v in layer.base.state_dict().items()}
    start = {k: v.clone() for k, v in factor_tensors(model).items()}
    optimizer = torch.optim.SGD(model.parameters().values(), lr=0.1, weight_decay=0.1)
    layer(draw(4, 8)).square().sum().backward()
    optimizer.step()
    assert all(torch.equal(v, before[k]) for k, v in layer.base.state_dict().items())
    for name, value in factor_tensors(model).items():
        assert not torch.equal(value, start[name]), name


@every_case
def test_state_holds_only_factors_and_restores_the_function(case):
    model = adapted(case, 12, 8)
    state = model.state()
    assert set(state.tensors) == {
        f"layers.0.{name}" for name in model.method.factor_shapes(model.spec.layers[0])
    }
    other = AdaptedModel.from_spec(adapted(case, 12, 8).detach(), model.spec, "base")
    other.load(state.tensors)
    x = draw(3, 8)
    assert torch.equal(only_layer(other)(x), only_layer(model)(x))


@every_case
def test_module_state_dict_has_no_basis(case):
    model = adapted(case, 12, 8)
    names = set(only_layer(model).state_dict())
    factors = {f"{name}.weight" for name in only_layer(model).factors()}
    assert names == {"base.weight", "base.bias"} | factors


@every_case
def test_dropout_acts_on_the_adapter_input_only(case):
    model = adapted(case, 12, 8, dropout=0.5)
    layer = only_layer(model)
    x = draw(2, 3, 8, seed=5)
    layer.eval()
    plain = layer(x)
    assert torch.equal(plain, layer(x))
    layer.train()
    model.key_dropout(1)
    first, again = layer(x), layer(x)
    assert torch.equal(first, again)
    model.key_dropout(2)
    assert not torch.equal(first, layer(x))
    dropped = layer.dropout(x)
    expected = dense_with_dropout(model, x, dropped)
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-5)


def dense_with_dropout(model: AdaptedModel, x: torch.Tensor, dropped: torch.Tensor) -> torch.Tensor:
    """Base part of x plus adapter part of dropped x; for DoRA inside the magnitude."""
    layer = only_layer(model)
    w = layer.weight.double()
    change = reference(model)
    if model.spec.method != "dora":
        return x.double() @ w.T + dropped.double() @ change.T + layer.bias.double()
    f = {name: value.double() for name, value in factor_tensors(model).items()}
    low = layer.layer.scale * f["B"] @ f["A"]
    inner = x.double() @ w.T + dropped.double() @ low.T
    return inner * f["m"] / (w + low).norm(dim=1) + layer.bias.double()


@every_case
def test_base_in_bfloat16(case):
    """bf16 has 8 bits: outputs agree to a few parts in 256 of their largest entry."""
    model = adapted(case, 12, 8, dtype=torch.bfloat16)
    layer = only_layer(model)
    assert all(p.dtype == torch.float32 for p in layer.factors().values())
    change = reference(model)
    torch.testing.assert_close(layer.delta_weight().double(), change, rtol=1e-5, atol=1e-5)
    for x in inputs(8, torch.bfloat16):
        y = layer(x)
        assert y.dtype == torch.bfloat16
        expected = x.double() @ (layer.weight.double() + change).T + layer.bias.double()
        error = (y.double() - expected).abs().max() / expected.abs().max()
        assert error < 0.02, f"error {error:.4f}, expected less than 0.02"


@every_case
def test_small_factors_survive_a_bfloat16_base(case):
    """A change far below the resolution of W0 in bf16 still reaches delta_weight()."""
    model = adapted(case, 12, 8, random=False, dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter in only_layer(model).factors().values():
            parameter.add_(1e-4)
    change = reference(model)
    error = (only_layer(model).delta_weight().double() - change).norm() / change.norm()
    assert error < 1e-2


@every_case
def test_base_in_float64(case):
    model = adapted(case, 10, 7, dtype=torch.float64)
    layer = only_layer(model)
    assert all(p.dtype == torch.float64 for p in layer.factors().values())
    x = draw(2, 3, 7, dtype=torch.float64)
    expected = x @ (layer.weight + reference(model)).T + layer.bias
    torch.testing.assert_close(layer(x), expected, rtol=1e-11, atol=1e-11)


@every_case
def test_under_autocast(case):
    model = adapted(case, 12, 8)
    layer = only_layer(model)
    x = draw(2, 3, 8)
    exact = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        y.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.factors().values())
    error = (y - exact).abs().max() / exact.abs().max()
    assert error < 0.03, f"error {error:.4f}, expected less than 0.03"


@every_case
def test_gradients_are_the_same_with_checkpointing(case):
    model = adapted(case, 12, 8, dropout=0.3)
    layer = only_layer(model)
    layer.train()
    model.key_dropout(4)
    x = draw(2, 3, 8).requires_grad_()
    grads = []
    for recompute in (False, True):
        y = checkpoint(layer, x, use_reentrant=False) if recompute else layer(x)
        grads.append(torch.autograd.grad(y.square().sum(), [x, *layer.factors().values()]))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@every_case
def test_global_random_state_is_untouched(case):
    model = adapted(case, 12, 8).detach()
    spec = adapted(case, 12, 8).spec
    state = torch.get_rng_state()
    again = AdaptedModel.from_spec(model, spec, "base", dropout=0.5)
    again.model.train()
    again.key_dropout(1)
    only_layer(again)(draw(3, 8)).sum().backward()
    assert torch.equal(torch.get_rng_state(), state)


@every_case
def test_basis_follows_the_base_to_another_device(case):
    model = adapted(case, 12, 8)
    model.model.to("meta")
    layer = only_layer(model)
    assert {t.device.type for t in layer.basis.values()} <= {"meta"}
    if model.method.additive:
        assert layer(torch.empty(2, 8, device="meta")).shape == (2, 12)
