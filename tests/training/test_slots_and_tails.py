"""Terms that leave slots alone or empty them, against autograd and plain indexing."""

import pytest
import torch
from torch import nn

from fedlora.adapters.slots import indices
from fedlora.client.slot_choice import choose_slots, slot_freeze
from fedlora.training.terms import TailPenalty
from tests.server.cases import make_spec, random_state

SPEC = make_spec(rank=4)


def parameters(seed=0, zero=()):
    tensors = random_state(SPEC, seed).tensors
    return {name: nn.Parameter(0 * t if name in zero else t.clone()) for name, t in tensors.items()}


@pytest.mark.parametrize("slot", [0, 1, 3])
def test_the_penalty_has_the_gradient_of_the_product_of_the_tails(slot):
    """d/dA and d/dB of weight * sum over layers |B[:, slot:]| |A[slot:, :]|, by autograd."""
    held = parameters()
    TailPenalty(0.3, slot, SPEC.layers).edit_gradients(held)
    free = {name: p.detach().clone().requires_grad_() for name, p in held.items()}
    loss = sum(
        0.3 * free[f"{x.name}.B"][:, slot:].norm() * free[f"{x.name}.A"][slot:].norm()
        for x in SPEC.layers
    )
    loss.backward()
    for layer in SPEC.layers:
        for name in (f"{layer.name}.A", f"{layer.name}.B"):
            torch.testing.assert_close(held[name].grad, free[name].grad)
            assert float(held[name].grad.norm()) > 0


def test_the_penalty_adds_to_the_gradient_that_is_there():
    held = parameters()
    for parameter in held.values():
        parameter.grad = torch.ones_like(parameter)
    TailPenalty(0.3, 2, SPEC.layers).edit_gradients(held)
    assert torch.equal(held["p.A"].grad[:2], torch.ones(2, 5))
    assert not torch.equal(held["p.A"].grad[2:], torch.ones(2, 5))
    assert torch.equal(held["head.weight"].grad, torch.ones(3, 2))


def test_an_empty_tail_has_no_gradient_and_no_nan():
    held = parameters(zero=("p.B", "q.B"))
    TailPenalty(0.3, 2, SPEC.layers).edit_gradients(held)
    assert all(p.grad is None for p in held.values())


@pytest.mark.parametrize("factor", ["A", "B"])
@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_slots_outside_the_mask_keep_their_bits(factor, kind):
    """Whatever weight decay, momentum or moments of earlier rounds would do to them."""
    masks = (0b0101, 0b0000)
    held = {f"{x.name}.{factor}": parameters()[f"{x.name}.{factor}"] for x in SPEC.layers}
    start = {name: p.detach().clone() for name, p in held.items()}
    make = {
        "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.5),
        "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.5),
    }[kind]
    optimizer = make(list(held.values()))
    # a first step without the mask leaves momentum in every slot
    for step in range(4):
        for p in held.values():
            p.grad = torch.full_like(p, 1.0 + step)
        if step == 0:
            optimizer.step()
            with torch.no_grad():
                for name, p in held.items():
                    p.copy_(start[name])
            freeze = slot_freeze(SPEC, [factor], masks, start)
            continue
        freeze.edit_gradients(held)
        optimizer.step()
        freeze.after_step(held)
    for layer, mask in zip(SPEC.layers, masks, strict=True):
        name = f"{layer.name}.{factor}"
        for slot in range(4):
            pick = (slice(None), slot) if factor == "B" else slot
            same = torch.equal(held[name][pick], start[name][pick])
            assert same == (slot not in indices(mask, 4))


@pytest.mark.parametrize("factor", ["A", "B"])
def test_slots_are_scored_by_their_change_times_their_other_half(factor):
    """|delta B[:, j]| |A[j, :]| when B is trained, |B[:, j]| |delta A[j, :]| when A is."""
    start, tried = random_state(SPEC, 1).tensors, random_state(SPEC, 2).tensors
    for budget in range(1, 9):
        masks = choose_slots(SPEC, [factor], start, tried, budget)
        scores = {}
        for i, layer in enumerate(SPEC.layers):
            for j in range(4):
                moved = tried[f"{layer.name}.{factor}"] - start[f"{layer.name}.{factor}"]
                frozen = start[f"{layer.name}.{'A' if factor == 'B' else 'B'}"]
                b, a = (moved, frozen) if factor == "B" else (frozen, moved)
                scores[i, j] = float(b[:, j].norm() * a[j].norm())
        best = sorted(scores, key=scores.__getitem__, reverse=True)[:budget]
        found = [(i, j) for i, mask in enumerate(masks) for j in indices(mask, 4)]
        assert sorted(best) == found
