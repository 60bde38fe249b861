"""Frozen random and derived tensors: equal where they must be, refused where they are not."""

import dataclasses
import subprocess
import sys

import pytest
import torch

from fedlora.adapter import tensors_digest
from fedlora.adapters.inject import AdaptedModel, adapt
from fedlora.adapters.pissa import principal_factors
from fedlora.errors import AdapterError
from tests.adapters.cases import Case, Net, adapted, draw, linear

torch.set_num_threads(1)

PROGRAM = """
import torch
from tests.adapters.test_basis import vera_digest
torch.manual_seed({noise})
torch.rand({noise})
print(vera_digest({seed}))
"""


def vera_digest(seed: int) -> str:
    return adapted(Case("vera"), seed=seed).spec.basis_digest


def digest_elsewhere(seed: int, noise: int) -> str:
    program = PROGRAM.format(seed=seed, noise=noise)
    done = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


def test_seeded_basis_is_equal_in_another_process_and_differs_by_seed():
    assert digest_elsewhere(seed=3, noise=5) == vera_digest(3)
    assert vera_digest(3) != vera_digest(4)


def test_vera_shares_one_pair_of_the_largest_shape():
    """Bounds sqrt(6 / columns), the He uniform initialisation of the paper's section 3.3."""
    model = adapt(
        Net(linear(12, 8), linear(6, 40), linear(30, 5)),
        method="vera",
        rank=300,
        alpha=None,
        targets="all-linear",
        heads=(),
        base_fingerprint="base",
        seed=1,
    )
    a, b = model.basis["shared.A"], model.basis["shared.B"]
    assert a.shape == (300, 40)
    assert b.shape == (30, 300)
    for matrix in (a, b):
        bound = (6 / matrix.shape[1]) ** 0.5
        assert 0.98 * bound < matrix.abs().max() <= bound
        assert abs(float(matrix.std()) - bound / 3**0.5) < 0.02 * bound
    held = {layer.basis["shared.A"].data_ptr() for layer in model.layers.values()}
    assert len(held) == 1, "each layer copied the shared matrix"


def test_vera_starts_with_the_option_d_initial():
    model = adapted(Case("vera", options={"d_initial": 0.25}), random=False)
    tensors = model.state().tensors
    assert torch.equal(tensors["layers.0.v"], torch.full((4,), 0.25))
    assert not tensors["layers.0.b"].any()


@pytest.mark.parametrize("shape", [(12, 8), (8, 12), (9, 9)], ids=str)
def test_pissa_basis_is_the_best_approximation_of_the_base(shape):
    """Eckart-Young: what is left has spectral norm sigma_(r+1)."""
    weight = draw(*shape, dtype=torch.float64)
    sigma = torch.linalg.svdvals(weight)
    for scale in (1.0, 0.5):
        a, b = principal_factors(weight, 3, scale)
        left = weight - scale * b @ a
        torch.testing.assert_close(torch.linalg.matrix_norm(left, 2), sigma[3])
        torch.testing.assert_close(left + scale * b @ a, weight)
        peaks = b.gather(0, b.abs().argmax(0, keepdim=True))
        assert (peaks > 0).all()
        torch.testing.assert_close(b.norm(dim=0), (sigma[:3] / scale).sqrt())


def test_pissa_starts_at_its_basis_and_default_alpha_gives_scale_one():
    model = adapted(Case("pissa"), random=False)
    tensors = model.state().tensors
    assert model.spec.layers[0].scale == 1.0
    assert torch.equal(tensors["layers.0.A"], model.basis["layers.0.A0"])
    assert torch.equal(tensors["layers.0.B"], model.basis["layers.0.B0"])


def test_pissa_basis_of_a_rank_deficient_base_is_finite():
    a, b = principal_factors(torch.outer(draw(6), draw(5)), 3, 1.0)
    assert a.isfinite().all()
    assert b.isfinite().all()


@pytest.mark.parametrize("method", ["vera", "pissa", "lora-xs"])
@pytest.mark.parametrize("how", ["sign", "bit", "missing", "swapped"])
def test_a_silently_different_basis_is_refused(method, how):
    model = adapted(Case(method))
    basis = dict(model.basis)
    first, second = sorted(basis)
    if how == "sign":
        basis = {name: -tensor for name, tensor in basis.items()}
    elif how == "bit":
        basis[first] = basis[first].clone()
        basis[first][0, 0] = torch.nextafter(basis[first][0, 0], torch.tensor(9.0))
    elif how == "missing":
        del basis[first]
    else:
        basis = {first: basis[second], second: basis[first]}
    assert tensors_digest(basis) != model.spec.basis_digest
    with pytest.raises(AdapterError, match="frozen basis has digest"):
        AdaptedModel.from_spec(adapted(Case(method)).detach(), model.spec, "base", basis)


def test_a_basis_made_from_another_seed_is_refused():
    model = adapted(Case("vera"))
    other = dataclasses.replace(model.spec, seed=model.spec.seed + 1)
    with pytest.raises(AdapterError, match="frozen basis has digest"):
        AdaptedModel.from_spec(adapted(Case("vera")).detach(), other, "base")


def test_a_basis_sent_by_the_server_is_used_as_it_is():
    model = adapted(Case("pissa"))
    other = AdaptedModel.from_spec(
        adapted(Case("lora")).detach(), model.spec, "base", dict(model.basis)
    )
    assert all(torch.equal(other.basis[name], model.basis[name]) for name in model.basis)


@pytest.mark.parametrize("method", ["vera", "pissa", "lora-xs"])
def test_basis_is_float32_on_the_cpu_for_any_base(method):
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        basis = adapted(Case(method), dtype=dtype).basis
        assert {(t.dtype, t.device.type) for t in basis.values()} == {(torch.float32, "cpu")}
