"""Opacus per-sample gradients against the obvious slow way: one backward pass per sample."""

import copy
import warnings

import pytest
import torch
from opacus.grad_sample import GradSampleModule, GradSampleModuleFastGradientClipping
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from fedlora.adapters.inject import adapt
from fedlora.adapters.leaves import BlockDiagLinear, BoneColDelta, DiagScale
from fedlora.privacy.grad_samplers import register_grad_samplers
from tests.adapters.cases import CASES, SHAPES, Case, adapted, draw, only_layer, randomise

torch.set_num_threads(1)
register_grad_samplers()
pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing")

METHOD_CASES = [*CASES, Case("bone-row", rank=2, label="bone-row-small")]
BATCHES = pytest.mark.parametrize("batch", [(3,), (3, 2), (3, 5), (2, 2, 3), (1, 1)], ids=str)


def slow(model, x, g):
    """Factor name -> (N, ...) by N separate backward passes."""
    layer = only_layer(model)
    factors = layer.factors()
    rows = []
    for n in range(x.shape[0]):
        loss = (layer(x[n : n + 1]) * g[n : n + 1]).sum()
        rows.append(torch.autograd.grad(loss, list(factors.values())))
    return {name: torch.stack([row[i] for row in rows]) for i, name in enumerate(factors)}


@pytest.mark.parametrize("case", METHOD_CASES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@BATCHES
def test_grad_samples_equal_separate_backward_passes(case, shape, batch):
    d, k = shape
    model = adapted(case, d, k)
    x, g = draw(*batch, k, seed=31), draw(*batch, d, seed=32)
    expected = slow(model, x, g)
    wrapped = GradSampleModule(model.model, loss_reduction="sum")
    (wrapped(x) * g).sum().backward()
    for name, parameter in only_layer(model).factors().items():
        assert parameter.grad_sample.shape == (batch[0], *parameter.shape)
        torch.testing.assert_close(parameter.grad_sample, expected[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", METHOD_CASES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@BATCHES
def test_norm_samples_are_the_norms_of_the_grad_samples(case, shape, batch):
    d, k = shape
    model = adapted(case, d, k)
    x, g = draw(*batch, k, seed=31), draw(*batch, d, seed=32)
    expected = slow(model, x, g)
    wrapped = GradSampleModuleFastGradientClipping(
        model.model, loss_reduction="sum", use_ghost_clipping=True
    )
    (wrapped(x) * g).sum().backward()
    for name, parameter in only_layer(model).factors().items():
        norms = expected[name].flatten(1).norm(dim=1)
        torch.testing.assert_close(parameter._norm_sample, norms, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", METHOD_CASES, ids=str)
def test_trained_parameters_live_in_leaves_that_opacus_knows(case):
    model = adapted(case)
    known = GradSampleModuleFastGradientClipping(model.model)
    for module in model.model.modules():
        own = [p for p in module.parameters(recurse=False) if p.requires_grad]
        if own:
            assert type(module) in known.GRAD_SAMPLERS
            assert type(module) in known.NORM_SAMPLERS
            assert not list(module.buffers())
            assert not list(module.children())


@pytest.mark.parametrize("case", METHOD_CASES, ids=str)
def test_an_empty_batch_has_empty_grad_samples(case):
    """Poisson sampling draws no record now and then."""
    model = adapted(case, 12, 8)
    wrapped = GradSampleModule(model.model, loss_reduction="sum")
    wrapped(torch.zeros(0, 2, 8, requires_grad=True)).sum().backward()
    for parameter in only_layer(model).factors().values():
        assert parameter.grad_sample.shape == (0, *parameter.shape)


@pytest.mark.parametrize(
    ("leaf", "arguments"),
    [
        (DiagScale(torch.ones(6)), (draw(2, 3, 6),)),
        (BlockDiagLinear(torch.ones(2, 3, 3)), (draw(2, 3, 6),)),
        (BoneColDelta(torch.ones(2, 3, 3)), (draw(6, 6), draw(2, 3, 6))),
    ],
    ids=["diag", "block", "bone"],
)
def test_a_frozen_leaf_has_no_samples(leaf, arguments):
    leaf = copy.deepcopy(leaf).requires_grad_(False)
    known = GradSampleModuleFastGradientClipping(nn.Linear(1, 1))
    for table in (known.GRAD_SAMPLERS, known.NORM_SAMPLERS):
        assert table[type(leaf)](leaf, list(arguments), draw(2, 3, 6)) == {}


@pytest.mark.parametrize("case", METHOD_CASES, ids=str)
def test_grad_samples_through_a_whole_transformer(case):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    model = adapt(
        LlamaForCausalLM(config),
        method=case.method,
        rank=case.rank,
        alpha=None,
        targets="all-linear",
        heads=(),
        base_fingerprint="",
        seed=1,
        options=case.options,
    )
    randomise(model, size=0.05)
    tokens = torch.randint(0, 32, (3, 5), generator=torch.Generator().manual_seed(1))
    parameters = model.parameters()

    def loss(net, batch):
        logits = net(input_ids=batch).logits[:, :-1]
        flat = nn.functional.cross_entropy(
            logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="none"
        )
        return flat.sum()

    model.model.train()
    one_by_one = [
        torch.autograd.grad(loss(model.model, tokens[n : n + 1]), list(parameters.values()))
        for n in range(3)
    ]
    wrapped = GradSampleModule(model.model, loss_reduction="sum")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loss(wrapped, tokens).backward()
    for i, (name, parameter) in enumerate(parameters.items()):
        expected = torch.stack([grads[i] for grads in one_by_one])
        torch.testing.assert_close(parameter.grad_sample, expected, rtol=1e-4, atol=1e-5, msg=name)
