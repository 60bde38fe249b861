"""A norm that shrinks its output, against the norm and the product by themselves in float64."""

import pytest
import torch

from fedlora.ops.rmsnorm_shrink import rmsnorm_shrink
from tests.kernels.close import assert_close
from tests.kernels.conftest import GPU
from tests.kernels.low_rank import normal

EPS = 1e-5
# two roundings, which the interpreter does by cutting off
BOUNDS = {
    **{torch.float64: 1e-13, torch.float32: 1e-5, torch.float16: 1e-3},
    torch.bfloat16: 6e-3 if GPU else 1.2e-2,
}


def setting(rows, width, rank, kind):
    x = normal(rows, width, seed=1, dtype=kind, margin=3).requires_grad_()
    weight = 1.0 + normal(width, seed=2) / 4
    return x, weight.to(kind), normal(rank, width, seed=3, dtype=kind).requires_grad_()


def by_itself(x, weight, a):
    normed = x * (x.square().mean(-1, keepdim=True) + EPS).rsqrt() * weight
    return torch.cat([normed, normed @ a.T], -1)


@pytest.mark.parametrize(
    ("rows", "width", "rank"), [(37, 100, 5), (1, 17, 1), (16, 128, 48), (20, 50, 70), (0, 8, 2)]
)
@pytest.mark.parametrize("kind", list(BOUNDS), ids=str)
def test_equals_norm_and_product(impl, rows, width, rank, kind):
    inputs = setting(rows, width, rank, kind)
    wide = [t.detach().double().requires_grad_() for t in inputs]
    found, expected = rmsnorm_shrink(*inputs, EPS), by_itself(*wide)
    g = normal(rows, width + rank, seed=4)
    grads = torch.autograd.grad(found, inputs[::2], g.to(kind))
    for one, other in zip(
        (found, *grads), (expected, *torch.autograd.grad(expected, wide[::2], g)), strict=True
    ):
        assert one.dtype == kind
        assert_close(one, other, 1.5 * BOUNDS[kind])


def test_is_the_norm_of_transformers():
    """Also in what is rounded when."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    x, weight, a = setting(30, 64, 4, torch.bfloat16)
    norm = LlamaRMSNorm(64, EPS).to(torch.bfloat16)
    norm.weight.data.copy_(weight)
    assert torch.equal(rmsnorm_shrink(x, weight, a, EPS)[:, :64], norm(x))


def test_the_buffer_is_a_whole_linear():
    """[X | S] [W | B]^T = X W^T + S B^T."""
    x, weight, a = setting(9, 12, 2, torch.float64)
    w, b = normal(5, 12, seed=5), normal(5, 2, seed=6)
    buffer = rmsnorm_shrink(x, weight, a, EPS)
    normed = by_itself(x, weight, a)[:, :12]
    assert_close(buffer @ torch.cat([w, b], 1).T, normed @ w.T + (normed @ a.T) @ b.T, 1e-13)


def test_gradcheck_and_compile():
    x, weight, a = setting(4, 9, 2, torch.float64)
    x = x.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x, a: rmsnorm_shrink(x, weight, a, EPS), (x, a))
    torch._dynamo.reset()
    compiled = torch.compile(rmsnorm_shrink, fullgraph=True, backend="aot_eager")
    assert_close(compiled(x, weight, a, EPS), rmsnorm_shrink(x, weight, a, EPS), 1e-14)
