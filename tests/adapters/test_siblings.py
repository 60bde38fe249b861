"""Layers of one input by one op: what they give, and when they must not wait for each other."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from transformers import BertConfig, BertModel, ViTConfig, ViTModel

from fedlora.adapters import lora
from fedlora.adapters.inject import adapt
from tests.adapters.cases import draw
from tests.adapters.test_inject import llama

torch.set_num_threads(1)

SMALL = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


def model_of(kind):
    torch.manual_seed(0)
    if kind == "llama":
        return llama().model
    if kind == "bert":
        return BertModel(BertConfig(vocab_size=32, **SMALL))
    return ViTModel(ViTConfig(image_size=8, patch_size=4, num_channels=1, **SMALL))


def adapted(kind="llama", dropout=0.0, targets="all-linear"):
    made = adapt(
        model_of(kind).double(),
        method="lora",
        rank=2,
        alpha=None,
        targets=targets,
        heads=(),
        base_fingerprint="",
        seed=0,
        dropout=dropout,
    )
    for i, parameter in enumerate(made.train_only(("A", "B")).values()):
        parameter.data = draw(*parameter.shape, seed=i, dtype=torch.float64)
    made.key_dropout(7)
    made.model.train()
    return made


def inputs(kind):
    if kind == "vit":
        return {"pixel_values": draw(2, 1, 8, 8, seed=1, dtype=torch.float64)}
    return {"input_ids": torch.arange(12).view(2, 6)}


def results(made, kind):
    """Outputs, and gradients of all factors; a pooler has no part in these outputs."""
    y = made.model(**inputs(kind)).last_hidden_state
    slope = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
    factors = list(made.parameters().values())
    return y, *torch.autograd.grad(y, factors, slope, allow_unused=True, materialize_grads=True)


def apart(made):
    for layer in made.layers.values():
        layer.together = None
    return made


@pytest.fixture
def ops(monkeypatch):
    """How many linears each call of the op was given."""
    calls = []

    def counted(x, weights, *rest):
        calls.append(len(weights))
        return plain(x, weights, *rest)

    plain = lora.lora_linears
    monkeypatch.setattr(lora, "lora_linears", counted)
    return calls


@pytest.mark.parametrize(
    ("kind", "layer"),
    [("llama", [3, 1, 2, 1]), ("bert", [3, 1, 1, 1]), ("vit", [3, 1, 1, 1])],
    ids=["llama", "bert", "vit"],
)
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_together_is_what_each_gives_alone(kind, layer, dropout, ops):
    made = adapted(kind, dropout)
    found = results(made, kind)
    assert ops[:8] == 2 * layer
    before = len(ops)
    expected = results(apart(made), kind)
    assert set(ops[before:]) == {1}
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)


def test_siblings_share_a_mask_and_other_layers_do_not():
    made = adapted(dropout=0.5)
    x = torch.ones(2, 6, 16, dtype=torch.float64)
    masks = {
        name: layer.dropout(x)
        for name, layer in made.layers.items()
        if "layers.0" in name and layer.layer.inp == 16
    }
    q, k, o, gate, up = (
        next(mask for name, mask in masks.items() if name.endswith(end))
        for end in ("q_proj", "k_proj", "o_proj", "gate_proj", "up_proj")
    )
    assert torch.equal(q, k)
    assert torch.equal(gate, up)
    assert not torch.equal(q, o)
    assert not torch.equal(q, gate)


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["k_proj", "v_proj"]], ids=str)
def test_part_of_the_siblings(targets, ops):
    """Those that have adapters."""
    made = adapted(targets=targets)
    found = results(made, "llama")
    assert ops == [2, 2]
    for one, other in zip(found, results(apart(made), "llama"), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)


def test_nothing_waits_after_a_pass():
    made = adapted()
    results(made, "llama")
    assert not any(layer.together._waiting for layer in made.layers.values() if layer.together)


def pair(made):
    layers = made.layers
    return (next(layers[n] for n in layers if n.endswith(end)) for end in ("q_proj", "k_proj"))


def alone(layer, x):
    held, layer.together = layer.together, None
    y = layer(x)
    layer.together = held
    return y


def test_another_input_is_computed_anew():
    q, k = pair(adapted())
    x, other = (draw(2, 3, 16, seed=i, dtype=torch.float64) for i in (1, 2))
    q(x)
    assert torch.allclose(k(other), alone(k, other))
    q(x)
    # equal, but not the same: its gradient goes elsewhere
    copy = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(k(copy).sum(), copy)
    assert slope.norm() > 0


@pytest.mark.parametrize("change", ["input", "factor", "base", "keys", "mode", "grad", "trained"])
def test_nothing_that_changed_meanwhile_is_missed(change):
    made = adapted(dropout=0.5)
    q, k = pair(made)
    x = draw(2, 3, 16, seed=1, dtype=torch.float64)
    if change == "trained":
        made.train_only(())
    with torch.set_grad_enabled(change != "grad"):
        q(x)
    if change == "input":
        x += 1.0
    elif change == "factor":
        with torch.no_grad():
            k.B.weight += 1.0
    elif change == "base":
        with torch.no_grad():
            k.base.weight += 1.0
    elif change == "trained":
        made.train_only(("B",))
    elif change == "keys":
        made.key_dropout(8)
    elif change == "mode":
        made.model.eval()
    y = k(x)
    assert torch.allclose(y, alone(k, x))
    assert y.requires_grad


@pytest.mark.parametrize("how", ["disabled", "hook", "merged"])
def test_one_that_stands_apart_is_left_alone(how, ops):
    made = adapted()
    q, k = pair(made)
    x = draw(2, 3, 16, seed=1, dtype=torch.float64)
    seen = []
    if how == "disabled":
        k.disabled = True
    elif how == "merged":
        k.merge()
    else:
        k.A.register_forward_hook(lambda *a: seen.append(1))
    q(x)
    assert ops == [1]
    k(x)
    assert len(seen) == (how == "hook")


def test_a_recomputed_pass_is_the_same():
    made = adapted(dropout=0.5)
    q, k = pair(made)
    x = draw(2, 3, 16, seed=1, dtype=torch.float64).requires_grad_()

    def run(x):
        x = x * 2.0
        return q(x)[..., :8] * k(x)

    factors = [x, q.A.weight, k.B.weight]
    once = torch.autograd.grad(run(x).sum(), factors)
    again = torch.autograd.grad(checkpoint(run, x, use_reentrant=False).sum(), factors)
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


def test_outputs_may_be_changed_in_place():
    q, k = pair(adapted())
    x = draw(2, 3, 16, seed=1, dtype=torch.float64).requires_grad_()
    (expected,) = torch.autograd.grad((q(x) * 2.0).sum() + k(x).sum(), x)
    y = q(x)
    y *= 2.0
    (found,) = torch.autograd.grad(y.sum() + k(x).sum(), x)
    torch.testing.assert_close(found, expected)


def test_without_a_graph():
    made = adapted()
    with torch.inference_mode():
        y = made.model(**inputs("llama")).last_hidden_state
    assert torch.allclose(y, results(apart(made), "llama")[0])
