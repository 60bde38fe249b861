"""When averaging the factors averages the weight change, and by how much it misses."""

import dataclasses

import pytest
import torch

from fedlora.adapter import LayerSpec
from fedlora.adapters import METHODS
from fedlora.errors import AdapterError
from tests.adapters import dense
from tests.adapters.cases import CASES, Case, adapted, draw, factor_tensors, only_layer, randomise

torch.set_num_threads(1)

WEIGHTS = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
# the zero-initialised factor and the other one of a LoRA-like product
PAIRS = {"lora": ("B", "A"), "rslora": ("B", "A"), "pissa": ("B", "A"), "vera": ("b", "v")}
AFFINE = ("lora-xs", "miss", "bone-col", "bone-row")
RESIZABLE = [case for case in CASES if case.method not in ("pissa", "bone-col", "bone-row")]


def clients(case: Case, d: int = 10, k: int = 7):
    """(layer, basis, W0, dense change of given factors, factors of three clients)."""
    model = adapted(case, d, k, dtype=torch.float64)
    layer = only_layer(model)
    held = []
    for client in range(3):
        randomise(model, seed=100 * client)
        held.append({name: value.clone() for name, value in factor_tensors(model).items()})

    def change(factors):
        return dense.delta(case.method, layer.layer, layer.weight, factors, model.basis)

    return layer, change, held


def mean(tensors):
    return sum(w * t for w, t in zip(WEIGHTS, tensors, strict=True))


def mean_factors(held):
    return {name: mean([f[name] for f in held]) for name in held[0]}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_affine_methods_average_exactly_and_no_other_does(case):
    _, change, held = clients(case)
    exact = mean([change(f) for f in held])
    gap = (change(mean_factors(held)) - exact).norm() / exact.norm()
    assert METHODS[case.method].affine == (case.method in AFFINE)
    if METHODS[case.method].affine:
        assert gap < 1e-12
    else:
        assert gap > 1e-3


@pytest.mark.parametrize("case", [c for c in CASES if c.method in PAIRS], ids=str)
def test_bilinear_methods_miss_by_the_covariance_of_their_factors(case):
    """sum_i w_i P_i Q_i - (mean P)(mean Q) = sum_i w_i (P_i - mean P)(Q_i - mean Q)."""
    first, second = METHODS[case.method].bilinear_factors
    assert (first, second) == PAIRS[case.method]
    _, change, held = clients(case)
    centre = mean_factors(held)
    gap = mean([change(f) for f in held]) - change(centre)
    # the change of a product of deviations, without the constant of a derived basis
    nothing = {first: torch.zeros_like(centre[first]), second: torch.zeros_like(centre[second])}
    covariance = mean([change({n: f[n] - centre[n] for n in f}) - change(nothing) for f in held])
    torch.testing.assert_close(gap, covariance, rtol=1e-10, atol=1e-12)
    assert gap.norm() > 1e-3


@pytest.mark.parametrize("case", [c for c in CASES if c.method in PAIRS], ids=str)
def test_bilinear_methods_average_exactly_with_one_factor_frozen(case):
    first, second = PAIRS[case.method]
    _, change, held = clients(case)
    for frozen in (first, second):
        shared = [{**f, frozen: held[0][frozen]} for f in held]
        exact = mean([change(f) for f in shared])
        torch.testing.assert_close(change(mean_factors(shared)), exact, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_first_bilinear_factor_starts_at_zero_or_at_the_basis(case):
    pair = METHODS[case.method].bilinear_factors
    if pair is None:
        return
    start = factor_tensors(adapted(case, random=False))[pair[0]]
    assert bool(start.any()) == (METHODS[case.method].basis_provenance == "derived")


@pytest.mark.parametrize("case", RESIZABLE, ids=str)
def test_a_larger_rank_embeds_the_same_change(case):
    method = METHODS[case.method]
    layer, _, held = clients(case)
    old = layer.layer
    new = LayerSpec(old.name, old.out, old.inp, 2 * old.rank, old.scale, old.tile)
    grown = {n: method.resize(n, t, old, new) for n, t in held[0].items()}
    assert {n: tuple(t.shape) for n, t in grown.items()} == method.factor_shapes(new)
    basis = wide_basis(layer.basis, new)
    after = dense.delta(case.method, new, layer.weight, grown, basis)
    before = dense.delta(case.method, old, layer.weight, held[0], basis)
    torch.testing.assert_close(after, before, rtol=1e-10, atol=1e-12)
    back = {n: method.resize(n, t, new, old) for n, t in grown.items()}
    assert all(torch.allclose(back[n], held[0][n], rtol=1e-14) for n in back)


def wide_basis(basis, layer):
    """Any basis of the larger rank; only its leading slots are used by the smaller one."""
    if not basis:
        return {}
    a, b = sorted(basis)
    assert (a[-2:], b[-2:]) == (".A", ".B")
    return {
        a: draw(layer.rank, layer.inp, dtype=torch.float64),
        b: draw(layer.out, layer.rank, dtype=torch.float64),
    }


@pytest.mark.parametrize("case", [c for c in CASES if c.method == "lora-xs"], ids=str)
def test_lora_xs_clients_of_unequal_rank_average_exactly(case):
    """sum_i w_i B_i R_i A_i = B (sum_i w_i pad(R_i)) A, with B_i, A_i the leading slots."""
    method = METHODS["lora-xs"]
    layer, change, held = clients(case)
    whole, total, padded = layer.layer, 0, 0
    for w, f, rank in zip(WEIGHTS, held, (4, 1, 3), strict=True):
        small = dataclasses.replace(whole, rank=rank)
        own = method.resize("R", f["R"], whole, small)
        assert torch.equal(own, f["R"][:rank, :rank])
        b, a = layer.basis["layers.0.B"][:, :rank], layer.basis["layers.0.A"][:rank]
        total = total + w * whole.scale * b @ own @ a
        padded = padded + w * method.resize("R", own, small, whole)
    torch.testing.assert_close(change({"R": padded}), total, rtol=1e-12, atol=1e-14)


def test_methods_without_an_exact_embedding_refuse_another_rank():
    old, new = LayerSpec("x", 12, 8, 4, 1.0), LayerSpec("x", 12, 8, 2, 1.0)
    for name in ("pissa", "bone-col", "bone-row"):
        method = METHODS[name]
        for factor, shape in method.factor_shapes(old).items():
            tensor = torch.ones(shape)
            assert torch.equal(method.resize(factor, tensor, old, old), tensor)
            with pytest.raises(AdapterError, match="cannot change rank from 4 to 2"):
                method.resize(factor, tensor, old, new)
    miss = METHODS["miss"]
    with pytest.raises(AdapterError, match="cannot change rank from 4 to 3"):
        miss.resize("D", torch.ones(12, 4), old, LayerSpec("x", 12, 8, 3, 1.0))
