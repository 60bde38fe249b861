"""LoRA-XS: its frozen directions, its gradient and what it sends, as the paper says."""

import pytest
import torch
import torch.nn.functional as F

import fedlora.adapters.svd as svd
from fedlora.adapters.inject import adapt
from fedlora.adapters.svd import canonical_signs, randomised_svd, truncated_svd
from fedlora.errors import ConfigError
from fedlora.wire import encode_tensors
from tests.adapters.cases import Case, Net, adapted, draw, linear, only_layer, seeded

torch.set_num_threads(1)

SVD, RANDOM = Case("lora-xs"), Case("lora-xs", options={"basis": "random"})
both = pytest.mark.parametrize("case", [SVD, RANDOM], ids=["svd", "random"])
shapes = pytest.mark.parametrize("shape", [(12, 8), (8, 12), (9, 9)], ids=str)


def pair(model):
    """B (d, r) and A (r, k), float64."""
    return model.basis["layers.0.B"].double(), model.basis["layers.0.A"].double()


def eye(size):
    return torch.eye(size, dtype=torch.float64)


@shapes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_basis_is_the_truncated_svd_of_the_base(shape, dtype):
    """B^T B = I, A A^T = diag(sigma^2), B A the best approximation of rank r."""
    model = adapted(SVD, *shape, dtype=dtype)
    weight = only_layer(model).weight.double()
    sigma = torch.linalg.svdvals(weight)
    b, a = pair(model)
    torch.testing.assert_close(b.T @ b, eye(4), rtol=0, atol=1e-5)
    torch.testing.assert_close(a @ a.T, torch.diag(sigma[:4] ** 2), rtol=1e-5, atol=1e-5)
    left = torch.linalg.matrix_norm(weight - b @ a, 2)
    torch.testing.assert_close(left, sigma[4], rtol=1e-5, atol=1e-5)
    assert (b.gather(0, b.abs().argmax(0, keepdim=True)) > 0).all()


@shapes
def test_random_basis_is_orthonormal_and_its_own_for_every_layer_and_seed(shape):
    b, a = pair(adapted(RANDOM, *shape))
    torch.testing.assert_close(b.T @ b, eye(4), rtol=0, atol=1e-5)
    torch.testing.assert_close(a @ a.T, eye(4), rtol=0, atol=1e-5)
    other = adapted(RANDOM, *shape, seed=4)
    assert not torch.allclose(pair(other)[0], b, atol=1e-2)
    twice = adapt(
        Net(linear(*shape), linear(*shape)),
        method="lora-xs",
        rank=4,
        alpha=None,
        targets="all-linear",
        heads=(),
        base_fingerprint="base",
        seed=3,
        options=RANDOM.options,
    )
    torch.testing.assert_close(pair(twice)[0], b)
    assert not torch.allclose(twice.basis["layers.1.B"].double(), b, atol=1e-2)


@both
def test_starts_close_to_the_base_but_not_on_it(case):
    """Entries of R from N(0, 1e-10)."""
    model = adapted(Case("lora-xs", rank=32, options=case.options), 40, 48, random=False)
    layer = only_layer(model)
    r = model.state().tensors["layers.0.R"]
    assert r.shape == (32, 32)
    assert abs(float(r.std()) / 1e-5 - 1.0) < 0.1
    assert abs(float(r.mean())) < 1e-6
    assert 0.0 < layer.delta_weight().norm() < 1e-3 * layer.weight.norm()
    assert layer.layer.scale == 1.0


@both
@shapes
def test_gradient_is_the_projected_gradient_of_the_full_weight(case, shape):
    """dL/dR = s B^T G A^T, with G from a dense layer of weight W0 + s B R A."""
    d, k = shape
    model = adapted(case, d, k, dtype=torch.float64)
    layer = only_layer(model)
    x, target = draw(6, k, dtype=torch.float64), draw(6, d, seed=1, dtype=torch.float64)
    weight = (layer.weight + layer.delta_weight()).detach().requires_grad_()
    (F.linear(x, weight, layer.bias) - target).pow(2).sum().backward()
    (layer(x) - target).pow(2).sum().backward()
    b, a = pair(model)
    found = layer.R.weight.grad
    torch.testing.assert_close(found, layer.layer.scale * b.T @ weight.grad @ a.T)
    # what an orthonormal basis leaves of the gradient is orthogonal to it
    left = b.T @ (weight.grad - b @ found @ a) @ a.T
    orthogonal = float(left.norm() / found.norm()) < 1e-5
    assert orthogonal == (case is RANDOM)


@both
def test_what_is_sent_depends_on_the_rank_only(case):
    sent = {
        len(encode_tensors(adapted(case, d, k).state().tensors))
        for d, k in ((12, 8), (8, 40), (64, 5))
    }
    assert len(sent) == 1
    tensors = adapted(case, 64, 5).state().tensors
    assert sum(t.numel() * t.element_size() for t in tensors.values()) == 4 * 4**2


def test_an_unknown_basis_is_refused_with_a_hint():
    with pytest.raises(ConfigError, match=r'basis = "randm".*did you mean "random".*svd, random'):
        adapted(Case("lora-xs", options={"basis": "randm"}))


def decaying(d, k, seed=1):
    """A (d, k) matrix with singular values 2^0, 2^-0.5, 2^-1, ..."""
    u = torch.linalg.qr(draw(d, min(d, k), seed=seed, dtype=torch.float64)).Q
    v = torch.linalg.qr(draw(k, min(d, k), seed=seed + 1, dtype=torch.float64)).Q
    return u * 2.0 ** (-0.5 * torch.arange(min(d, k))) @ v.T


@pytest.mark.parametrize("shape", [(60, 40), (40, 60), (12, 8)], ids=str)
def test_randomised_svd_finds_the_triplets_of_a_decaying_spectrum(shape):
    weight = decaying(*shape)
    u, sigma, vh = torch.linalg.svd(weight, full_matrices=False)
    exact = (*canonical_signs(u[:, :6], vh[:6]), sigma[:6])
    u, sigma, vh = randomised_svd(weight, 6, seeded(5))
    found = (*canonical_signs(u[:, :6], vh[:6]), sigma[:6])
    for f, e in zip(found, exact, strict=True):
        torch.testing.assert_close(f, e, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("shape", [(300, 200), (200, 300)], ids=str)
def test_randomised_svd_of_a_flat_spectrum(shape):
    """Single directions are not determined there; what must hold are orthonormality and energy."""
    weight = draw(*shape)
    u, sigma, vh = randomised_svd(weight, 16, seeded(5))
    assert u.shape == (shape[0], 26)
    torch.testing.assert_close(u.T @ u, torch.eye(26), rtol=0, atol=1e-5)
    torch.testing.assert_close(vh @ vh.T, torch.eye(26), rtol=0, atol=1e-5)
    torch.testing.assert_close(u.T @ weight, sigma[:, None] * vh, rtol=1e-4, atol=1e-4)
    best = torch.linalg.svdvals(weight)[:16].norm()
    assert 0.99 * best < sigma[:16].norm() <= 1.0001 * best


def test_large_weights_are_decomposed_at_random_and_alike_every_time(monkeypatch):
    weight = draw(60, 40)
    exact = truncated_svd(weight, 4, seeded(5))
    again = truncated_svd(weight, 4, seeded(6))
    assert all(torch.equal(e, a) for e, a in zip(exact, again, strict=True))
    monkeypatch.setattr(svd, "EXACT_UP_TO", 39)
    state = torch.get_rng_state()
    first, second = (truncated_svd(weight, 4, seeded(5)) for _ in range(2))
    assert all(torch.equal(f, s) for f, s in zip(first, second, strict=True))
    assert torch.equal(torch.get_rng_state(), state)
    assert [tuple(t.shape) for t in first] == [(60, 4), (4,), (4, 40)]
    assert not torch.equal(first[0], exact[0])
    assert not torch.equal(first[0], truncated_svd(weight, 4, seeded(6))[0])


@pytest.mark.parametrize("randomised", [False, True])
def test_basis_of_a_rank_deficient_base_is_orthonormal(randomised, monkeypatch):
    if randomised:
        monkeypatch.setattr(svd, "EXACT_UP_TO", 4)
    u, sigma, vh = truncated_svd(torch.outer(draw(30), draw(25)), 3, seeded(5))
    torch.testing.assert_close(u.T @ u, torch.eye(3), rtol=0, atol=1e-5)
    assert vh.isfinite().all()
    assert sigma[1] < 1e-4 * sigma[0]
