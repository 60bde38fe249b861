"""Gradients of single examples against autograd on each example alone, without padding."""

import pytest
import torch

from fedlora.adapters import METHODS
from fedlora.data.example import collate
from fedlora.privacy.per_sample import MODES, per_sample
from fedlora.training import loss
from fedlora.training.frozen_head import frozen_head
from fedlora.training.loss import example_losses
from fedlora.training.mode import training_mode
from tests.privacy.models import KINDS, make

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing")


def alone(made, parameters):
    """name -> (N, *shape), by one backward pass per unpadded example."""
    rows = []
    for example in made.examples:
        own = example_losses(made.adapted.model, collate([example], 0), made.task).sum()
        rows.append(torch.autograd.grad(own, list(parameters.values())))
    return {name: torch.stack([row[i] for row in rows]) for i, name in enumerate(parameters)}


def listened(mode, made, parameters):
    with per_sample(mode, made.adapted.model, parameters) as listening:
        listening.begin(len(made.examples))
        example_losses(made.adapted.model, collate(made.examples, 0), made.task).sum().backward()
        return {name: piece.whole() for name, piece in listening.pieces().items()}


def all_factors(made):
    return {name for layer in made.adapted.layers.values() for name in layer.factors()}


def check(mode, made, factors=None, checkpointing=False):
    parameters = made.adapted.train_only(factors or all_factors(made))
    with training_mode(made.adapted, checkpointing=False):
        expected = alone(made, parameters)
    with training_mode(made.adapted, checkpointing=checkpointing):
        found = listened(mode, made, parameters)
    assert found.keys() == expected.keys()
    for name, grads in expected.items():
        assert grads.abs().max() > 0, name
        torch.testing.assert_close(found[name], grads, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("mode", MODES)
def test_equal_to_one_backward_pass_per_unpadded_example(mode, method, kind):
    check(mode, make(kind, method))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("mode", MODES)
def test_a_loss_that_needs_no_logits_leaves_the_same_gradients(mode, kind, monkeypatch):
    """Oracle: one example at a time, with the model's own logits."""
    made = make(kind)
    parameters = made.adapted.train_only(all_factors(made))
    assert frozen_head(made.adapted.model) is not None
    with training_mode(made.adapted, checkpointing=False):
        found = listened(mode, made, parameters)
        monkeypatch.setattr(loss, "frozen_head", lambda model: None)
        expected = alone(made, parameters)
    for name, grads in expected.items():
        torch.testing.assert_close(found[name], grads, rtol=1e-5, atol=1e-5)
