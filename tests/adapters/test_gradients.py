"""Autograd against the closed forms of the per-sample gradients, in float64."""

import pytest
import torch

from tests.adapters import dense
from tests.adapters.cases import CASES, SHAPES, adapted, draw, factor_tensors, only_layer

torch.set_num_threads(1)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradient_is_the_sum_of_closed_form_sample_gradients(case, shape):
    d, k = shape
    model = adapted(case, d, k, dtype=torch.float64)
    layer = only_layer(model)
    x = draw(3, 2, k, seed=21, dtype=torch.float64)
    g = draw(3, 2, d, seed=22, dtype=torch.float64)
    (layer(x) * g).sum().backward()
    expected = dense.sample_grads(
        case.method, layer.layer, layer.weight, factor_tensors(model), model.basis, x, g
    )
    for name, parameter in layer.factors().items():
        total = expected[name].sum(0)
        assert total.abs().max() > 1e-3
        torch.testing.assert_close(parameter.grad, total, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_input_gradient_passes_through_the_merged_weight(case):
    """True for every method, DoRA included: its norm does not depend on x."""
    model = adapted(case, 10, 7, dtype=torch.float64)
    layer = only_layer(model)
    x = draw(3, 7, dtype=torch.float64).requires_grad_()
    g = draw(3, 10, seed=2, dtype=torch.float64)
    (layer(x) * g).sum().backward()
    merged = layer.weight + layer.delta_weight()
    torch.testing.assert_close(x.grad, g @ merged, rtol=1e-10, atol=1e-10)
