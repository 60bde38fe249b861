"""A fold is a change of the frozen base: the layer computes as if W0 + L Q were its weight."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from fedlora.adapter import with_rank
from fedlora.adapters.inject import AdaptedModel, adapt
from tests.adapters.cases import Net, draw, randomise

D, K = 12, 8


def base(kind: str, weight: torch.Tensor) -> nn.Module:
    """A layer of `kind` with W0 = weight (d, k)."""
    if kind == "conv1d":
        layer = Conv1D(D, K)
        layer.weight.data = weight.T.contiguous()
    else:
        layer = nn.Linear(K, D)
        layer.weight.data = weight.clone()
    layer.bias.data = draw(D, seed=9, dtype=weight.dtype)
    return layer


def model(kind: str, weight: torch.Tensor, dropout: float = 0.0) -> AdaptedModel:
    adapted = adapt(
        Net(base(kind, weight)),
        method="lora",
        rank=2,
        alpha=None,
        targets="all-linear",
        heads=(),
        base_fingerprint="base",
        seed=1,
        dropout=dropout,
    )
    randomise(adapted)
    adapted.key_dropout(3)
    return adapted


def version(rank: int, seed: int) -> dict[str, torch.Tensor]:
    left, right = draw(D, rank, seed=seed), draw(rank, K, seed=seed + 1)
    return {"layers.0.L": left, "layers.0.Q": right}


def change(*versions: dict[str, torch.Tensor]) -> torch.Tensor:
    return sum(v["layers.0.L"].double() @ v["layers.0.Q"].double() for v in versions)


# of rank 4 it is kept as two factors, of rank 9 as their product
@pytest.mark.parametrize("ranks", [(1, 3), (4, 5), (0, 2), (0, 0)], ids=str)
@pytest.mark.parametrize("shape", [(5,), (5, 3), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_the_layer_and_its_gradients_are_those_of_the_changed_base(kind, shape, ranks):
    weight = draw(D, K, dtype=torch.float64)
    versions = [version(rank, seed=10 + rank) for rank in ranks]
    folded = model(kind, weight, dropout=0.3)
    folded.fold(versions)
    plain = model(kind, weight + change(*versions), dropout=0.3)
    outputs, inputs = [], []
    for adapted in (folded, plain):
        adapted.model.train()
        adapted.train_only(["A", "B"])
        x = draw(*shape, K, seed=5, dtype=torch.float64).requires_grad_()
        y = adapted.model(x)
        y.square().sum().backward()
        outputs.append(y)
        inputs.append(x)
    assert outputs[0].shape == (*shape, D)
    torch.testing.assert_close(outputs[0], outputs[1])
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
    for name, parameter in folded.parameters().items():
        torch.testing.assert_close(parameter.grad, plain.parameters()[name].grad)


@pytest.mark.parametrize("rank", [3, 9])
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_merged_weights_contain_the_fold(kind, rank):
    weight = draw(D, K, dtype=torch.float64)
    adapted = model(kind, weight)
    adapted.fold([version(rank, seed=10)])
    x = draw(5, K, dtype=torch.float64)
    before = adapted.model(x)
    with adapted.merged():
        torch.testing.assert_close(adapted.model(x), before)
    assert torch.equal(adapted.model(x), before)
    assert torch.equal(adapted.layers["layers.0"].weight, weight)


def test_a_small_fold_is_not_lost_in_a_bf16_base():
    """The reason for a branch of its own: bf16 has 8 bits, and 2^-12 of a weight vanishes."""
    weight = torch.ones(D, K)
    adapted = model("linear", weight.bfloat16())
    x = torch.zeros(1, K)
    x[0, 0] = 1.0
    small = {"layers.0.L": torch.full((D, 1), 2.0**-12), "layers.0.Q": torch.ones(1, K)}
    with torch.no_grad():
        adapted.load({name: torch.zeros_like(p) for name, p in adapted.parameters().items()})
        layer = adapted.layers["layers.0"]
        layer.bias.zero_()
        layer.stored_weight.zero_()
        adapted.fold([small])
        y = adapted.model(x.bfloat16())
    assert y.dtype == torch.bfloat16
    assert torch.equal(y.float(), torch.full((1, D), 2.0**-12))


def test_a_fold_is_part_of_the_adapter_that_can_be_put_off_and_taken_back():
    adapted = model("linear", draw(D, K, dtype=torch.float64))
    x = draw(5, K, dtype=torch.float64)
    plain = adapted.model(x)
    with adapted.base_only():
        bare = adapted.model(x)
    adapted.fold([version(3, seed=10)])
    assert not torch.allclose(adapted.model(x), plain)
    with adapted.base_only():
        assert torch.equal(adapted.model(x), bare)
    adapted.fold(())
    assert torch.equal(adapted.model(x), plain)


def test_without_adapter_means_so_also_when_another_one_is_put_in_meanwhile():
    adapted = model("linear", draw(D, K, dtype=torch.float64))
    x = draw(5, K, dtype=torch.float64)
    with adapted.base_only():
        bare = adapted.model(x)
        adapted.rerank(with_rank(adapted.spec, 1))
        randomise(adapted)
        assert torch.equal(adapted.model(x), bare)
    assert not torch.allclose(adapted.model(x), bare)
