"""Gradients of single examples against autograd on each example, in float64."""

import pytest
import torch
from torch.nn import functional as F

from fedlora.ops.dp_lora_grads import sample_grads, squared_norms, weighted_sum
from tests.kernels.close import assert_close, seeded

# examples, tokens, inputs, outputs
CASES = {
    "A of rank 8": (3, 37, 150, 8),
    "B of rank 8": (3, 37, 8, 150),
    "rank 1": (2, 5, 70, 1),
    "rank 12": (2, 33, 12, 40),
    "one token": (2, 1, 20, 4),
    "one of all": (1, 1, 1, 1),
    "no token": (2, 0, 20, 4),
    "no example": (0, 5, 20, 4),
}


def made(case, x_type=torch.float32, g_type=torch.float32):
    count, tokens, inp, out = CASES[case]
    stream = seeded(3)
    x = torch.randn(count, tokens, inp, generator=stream)
    g = torch.randn(count, tokens, out, generator=stream)
    return x.to(x_type), g.to(g_type)


def alone(x, g):
    """Each example's gradient of sum(g * (x W^T)) by autograd."""
    weight = torch.zeros(g.shape[2], x.shape[2], dtype=torch.float64, requires_grad=True)
    rows = [
        torch.autograd.grad((F.linear(x[n].double(), weight) * g[n].double()).sum(), weight)[0]
        for n in range(len(x))
    ]
    return torch.stack(rows) if rows else weight.new_zeros(0, *weight.shape)


@pytest.mark.parametrize("case", CASES)
def test_gradients_and_norms(impl, case):
    x, g = made(case)
    grads, squares = sample_grads(x, g)
    expected = alone(x, g)
    assert_close(grads, expected, 1e-5)
    assert_close(squares, expected.square().sum((1, 2)), 2e-5)


@pytest.mark.parametrize(
    ("x_type", "g_type"),
    [
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
        (torch.float32, torch.bfloat16),
    ],
)
def test_narrow_inputs_lose_nothing(impl, x_type, g_type):
    """Products are summed in float32, whatever they are of."""
    x, g = made("A of rank 8", x_type, g_type)
    grads, _ = sample_grads(x, g)
    assert grads.dtype == torch.float32
    assert_close(grads, alone(x, g), 1e-5)


@pytest.mark.parametrize("case", ["A of rank 8", "B of rank 8"])
def test_the_norm_is_that_of_what_is_stored(impl, case):
    """Rounded up, a gradient would otherwise exceed the bound that it is clipped to."""
    x, g = made(case)
    grads, squares = sample_grads(x, g, torch.bfloat16)
    assert grads.dtype == torch.bfloat16
    assert_close(grads, alone(x, g), 8e-3)
    exact = grads.double().square().sum((1, 2))
    assert not torch.allclose(exact, alone(x, g).square().sum((1, 2)), rtol=1e-6, atol=0)
    assert_close(squares, exact, 1e-6)
    clip = 0.5
    weights = (clip / (squares.sqrt() + 1e-6)).clamp_max(1.0)
    for n in range(len(x)):
        alone_in_the_sum = weighted_sum(grads[n : n + 1], weights[n : n + 1])
        assert float(alone_in_the_sum.double().norm()) <= clip * (1 + 1e-6)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_with_its_example(impl, bad):
    x, g = made("A of rank 8")
    clean, norms = sample_grads(x, g)
    x[1], g[1] = bad, bad
    grads, squares = sample_grads(x, g)
    assert squares.isfinite().tolist() == [True, False, True]
    for n in (0, 2):
        assert torch.equal(grads[n], clean[n])
        assert torch.equal(squares[n], norms[n])


def test_float64_stays_so(impl):
    x, g = made("A of rank 8", torch.float64, torch.float64)
    grads, squares = sample_grads(x, g)
    assert grads.dtype == squares.dtype == torch.float64
    assert_close(grads, alone(x, g), 1e-14)


@pytest.mark.parametrize("shape", [(5, 3), (1,), (2, 1030), (7, 5, 11), (0,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_weighted_sum(impl, shape, dtype):
    """Oracle: a loop in float64, which leaves out examples of weight 0 whatever they hold."""
    grads = torch.randn(4, *shape, generator=seeded(1)).to(dtype)
    grads[1] = float("nan")
    grads[3] = float("inf")
    wide = torch.promote_types(dtype, torch.float32)
    weights = torch.tensor([0.5, 0.0, 0.25, 0.0], dtype=wide)
    total = weighted_sum(grads, weights)
    assert total.dtype == wide
    assert_close(total, 0.5 * grads[0].double() + 0.25 * grads[2].double(), 1e-6)


def test_weighted_sum_of_nothing_is_zero(impl):
    assert weighted_sum(torch.empty(0, 5), torch.empty(0)).tolist() == [0.0] * 5
    assert weighted_sum(torch.full((2, 5), float("nan")), torch.zeros(2)).tolist() == [0.0] * 5


def test_norms_of_narrow_gradients_are_wide():
    grads = torch.full((2, 300), 1.001).bfloat16()
    assert squared_norms(grads).dtype == torch.float32
    assert_close(squared_norms(grads), grads.double().square().sum(1), 1e-6)


def test_both_compile_without_a_break():
    x, g = made("A of rank 8")
    compiled = torch.compile(sample_grads, fullgraph=True, backend="aot_eager")
    for one, other in zip(compiled(x, g), sample_grads(x, g), strict=True):
        assert torch.equal(one, other)
