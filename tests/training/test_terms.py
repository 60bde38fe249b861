"""Terms of local training against autograd of the dense formulas, in float64."""

import pytest
import torch
from torch import nn

from fedlora.adapter import LayerSpec
from fedlora.training.terms import Correction, Freeze, ProductProximal, Proximal, TailPenalty
from tests.server.cases import randn

LAYERS = (LayerSpec("p", 6, 5, 3, 2.0), LayerSpec("q", 4, 7, 3, 0.5))


def draw(seed, size=0.7):
    """Factors of both layers and a head, float64."""
    found = {}
    for i, layer in enumerate(LAYERS):
        found[f"{layer.name}.A"] = randn(3, layer.inp, seed=seed + i, dtype=torch.float64)
        found[f"{layer.name}.B"] = randn(layer.out, 3, seed=seed + 10 + i, dtype=torch.float64)
    found["head.weight"] = randn(3, 2, seed=seed + 20, dtype=torch.float64)
    return {name: size * tensor for name, tensor in found.items()}


def parameters(names=None, seed=1, own=True):
    """Parameters, with gradients of their own unless told otherwise."""
    found = {n: nn.Parameter(t) for n, t in draw(seed).items() if names is None or n in names}
    if own:
        for i, p in enumerate(found.values()):
            p.grad = randn(*p.shape, seed=70 + i, dtype=torch.float64)
    return found


def added(term, given):
    """What a term adds to each gradient."""
    before = {
        n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in given.items()
    }
    term.edit_gradients(given)
    return {n: p.grad - before[n] for n, p in given.items() if p.grad is not None}


def autograd(penalty, given):
    """The gradients of a scalar of the parameters, zero where it does not depend on one."""
    leaves = {n: p.detach().clone().requires_grad_() for n, p in given.items()}
    grads = torch.autograd.grad(penalty(leaves), list(leaves.values()), allow_unused=True)
    return {
        n: torch.zeros_like(leaves[n]) if g is None else g
        for n, g in zip(leaves, grads, strict=True)
    }


def close(found, expected):
    assert found.keys() == expected.keys()
    for name in found:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-12, atol=1e-12)


def products(tensors, fixed):
    """Dense s B A of every layer; what is not trained is taken from `fixed`."""
    held = {**fixed, **tensors}
    return [layer.scale * held[f"{layer.name}.B"] @ held[f"{layer.name}.A"] for layer in LAYERS]


TRAINED = [None, ("p.B", "q.B", "head.weight"), ("p.A", "q.A")]


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("names", TRAINED)
def test_proximal_is_the_gradient_of_the_squared_distance(names, own):
    given, start = parameters(names, own=own), draw(5)

    def penalty(leaves):
        return 0.15 * sum(((leaves[n] - start[n]) ** 2).sum() for n in leaves)

    close(added(Proximal(0.3, start), given), autograd(penalty, given))


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("names", TRAINED)
def test_product_proximal_is_that_of_the_dense_weight_change(names, own):
    given, start = parameters(names, own=own), draw(5)

    def penalty(leaves):
        gaps = zip(products(leaves, start), products({}, start), strict=True)
        total = sum(((new - old) ** 2).sum() for new, old in gaps)
        heads = [n for n in leaves if n.startswith("head")]
        return 0.15 * (total + sum(((leaves[n] - start[n]) ** 2).sum() for n in heads))

    close(added(ProductProximal(0.3, start, LAYERS), given), autograd(penalty, given))


def test_product_proximal_does_not_see_how_the_change_is_divided():
    """The same product from other factors: no pull at all."""
    start = draw(5)
    given = {n: nn.Parameter(t * (4.0 if n.endswith("A") else 0.25)) for n, t in start.items()}
    del given["head.weight"]
    for value in added(ProductProximal(1.0, start, LAYERS), given).values():
        torch.testing.assert_close(value, torch.zeros_like(value), rtol=0, atol=1e-12)
    assert all(float(v.abs().max()) > 0.1 for v in added(Proximal(1.0, start), given).values())


def test_correction_adds_the_difference_to_its_tensors_alone():
    given = parameters()
    difference = {n: t for n, t in draw(8).items() if n.endswith("B")}
    found = added(Correction(difference), given)
    expected = {n: difference.get(n, torch.zeros_like(p)) for n, p in given.items()}
    close(found, expected)


@pytest.mark.parametrize("slot", [0, 1, 2])
def test_tail_penalty_is_the_gradient_of_the_product_of_norms(slot):
    given = parameters()

    def penalty(leaves):
        return 0.4 * sum(
            leaves[f"{x.name}.B"][:, slot:].norm() * leaves[f"{x.name}.A"][slot:].norm()
            for x in LAYERS
        )

    close(added(TailPenalty(0.4, slot, LAYERS), given), autograd(penalty, given))


def test_tail_penalty_is_silent_where_a_norm_is_zero():
    given = parameters()
    with torch.no_grad():
        given["p.B"].zero_()
    found = added(TailPenalty(0.4, 1, LAYERS), given)
    assert not bool(found["p.A"].any())
    assert not bool(found["p.B"].any())
    assert bool(found["q.A"].any())


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_freeze_leaves_masked_entries_to_the_bit_and_the_others_alone(momentum):
    """Momentum and decay would move a frozen entry although its gradient is zero."""
    masks = {"p.A": torch.tensor([[1.0], [0.0], [1.0]]), "p.B": torch.tensor([[1.0, 0.0, 1.0]])}
    given, free = parameters(own=False), parameters(own=False)
    start = {n: p.detach().clone() for n, p in given.items()}
    term = Freeze(masks, start)
    optimizers = [
        torch.optim.SGD(list(p.values()), lr=0.1, momentum=momentum, weight_decay=0.01)
        for p in (given, free)
    ]
    for step in range(3):
        for some in (given, free):
            for i, p in enumerate(some.values()):
                p.grad = randn(*p.shape, seed=10 * step + i, dtype=torch.float64)
        term.edit_gradients(given)
        for optimizer in optimizers:
            optimizer.step()
        term.after_step(given)
    assert torch.equal(given["p.A"][1], start["p.A"][1])
    assert torch.equal(given["p.B"][:, 1], start["p.B"][:, 1])
    for name, p in given.items():
        kept = masks.get(name, torch.ones(())).bool().expand_as(p)
        assert torch.equal(p[kept], free[name][kept])


def test_no_term_builds_a_graph():
    start = draw(5)
    for term in (
        Proximal(0.3, start),
        ProductProximal(0.3, start, LAYERS),
        TailPenalty(0.3, 1, LAYERS),
        Correction(draw(8)),
    ):
        given = parameters(own=False)
        term.edit_gradients(given)
        grads = [p.grad for p in given.values() if p.grad is not None]
        assert grads
        assert not any(grad.requires_grad for grad in grads)
