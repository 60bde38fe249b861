"""The loss without logits is the loss with them, for every class that is said to allow it."""

import pytest
import torch
import transformers

from fedlora.adapters.inject import adapt
from fedlora.adapters.leaves import linear_leaf
from fedlora.data.example import IGNORE, Example, collate
from fedlora.training import loss
from fedlora.training.frozen_head import PLAIN, frozen_head
from fedlora.training.loss import token_losses
from tests.adapters.cases import seeded

SIZES = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "initializer_range": 0.3,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 32,
}


def made(kind, dtype=torch.float32, **changes):
    """A random model of the class, with LoRA."""
    model_class = getattr(transformers, kind)
    config = model_class.config_class()
    for name, value in {**SIZES, **changes}.items():
        if hasattr(config, name):
            setattr(config, name, value)
    torch.manual_seed(3)
    model = model_class(config).to(dtype).eval()
    return adapt(
        model,
        method="lora",
        rank=4,
        alpha=None,
        targets="all-linear",
        heads=(),
        base_fingerprint="0" * 64,
        seed=1,
    )


def batch():
    """Of unequal lengths, with prompts that do not count, and one example that does not at all."""
    found = []
    for number, length in enumerate((5, 9, 12, 3)):
        ids = torch.randint(1, 50, (length,), generator=seeded(100 + number))
        target = ids.clone()
        target[: 1 + number % 3 if number < 3 else length] = IGNORE
        found.append(Example({"input_ids": ids}, target))
    return collate(found, 0)


def found(adapted):
    """(losses, hits, gradients) of one batch."""
    parameters = adapted.train_only(("A", "B"))
    made = token_losses(adapted.model, batch(), "causal-lm")
    grads = torch.autograd.grad(
        (made.losses.sum(1) * torch.arange(1, 5)).sum(), [*parameters.values()]
    )
    return made, grads


@pytest.mark.parametrize("kind", sorted(PLAIN))
def test_equal_to_the_loss_of_the_models_own_logits(kind, monkeypatch):
    adapted = made(kind)
    assert frozen_head(adapted.model) is not None
    ours, slopes = found(adapted)
    monkeypatch.setattr(loss, "frozen_head", lambda model: None)
    plain, expected = found(adapted)
    torch.testing.assert_close(ours.losses, plain.losses, rtol=1e-5, atol=1e-5)
    assert torch.equal(ours.right, plain.right)
    assert torch.equal(ours.counted, plain.counted)
    for one, other in zip(slopes, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("CohereForCausalLM", {"logit_scale": 0.5}),
        ("GraniteForCausalLM", {"logits_scaling": 4.0}),
        ("Gemma2ForCausalLM", {"final_logit_softcapping": 5.0}),
    ],
)
def test_models_that_change_their_logits_keep_them(kind, changes):
    """Oracle: the mean that transformers itself makes of labels."""
    adapted = made(kind, **changes)
    assert frozen_head(adapted.model) is None
    rows = batch()
    ours = token_losses(adapted.model, rows, "causal-lm")
    mean = adapted.model(**rows.inputs, labels=rows.target).loss
    torch.testing.assert_close(ours.losses.sum() / ours.counted.sum(), mean)


def test_a_head_that_is_trained_replaced_or_listened_to_is_left_alone():
    trained = made("LlamaForCausalLM").model
    trained.lm_head.weight.requires_grad_(True)
    assert frozen_head(trained) is None
    replaced = made("LlamaForCausalLM").model
    replaced.lm_head = torch.nn.Sequential(linear_leaf(replaced.lm_head.weight))
    assert frozen_head(replaced) is None
    listened = made("LlamaForCausalLM").model
    listened.lm_head.register_forward_hook(lambda *args: None)
    assert frozen_head(listened) is None
    derived = type("LlamaForCausalLM", (transformers.LlamaForCausalLM,), {})
    trained.lm_head.weight.requires_grad_(False)
    trained.__class__ = derived
    assert frozen_head(trained) is None


def test_the_head_of_a_narrow_base_rounds_as_the_model_does(monkeypatch):
    adapted = made("LlamaForCausalLM", dtype=torch.bfloat16)
    ours, _ = found(adapted)
    monkeypatch.setattr(loss, "frozen_head", lambda model: None)
    plain, _ = found(adapted)
    assert ours.losses.dtype == torch.float32
    torch.testing.assert_close(ours.losses, plain.losses, rtol=1e-5, atol=1e-5)
