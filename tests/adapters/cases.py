"""One small adapted layer per method, with random factors."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from fedlora.adapters.inject import AdaptedModel, adapt

SHAPES = ((12, 8), (8, 12), (8, 8), (10, 7))


@dataclass(frozen=True)
class Case:
    """A method with a rank and options, and what the papers say of it."""

    method: str
    rank: int = 4
    options: dict[str, Any] = field(default_factory=dict)
    label: str = ""

    def __str__(self) -> str:
        return self.label or self.method


CASES = (
    Case("lora"),
    Case("rslora"),
    Case("dora"),
    Case("pissa"),
    Case("lora-xs"),
    Case("lora-xs", options={"basis": "random"}, label="lora-xs-random"),
    Case("vera"),
    Case("vera", rank=16, label="vera-wide"),
    Case("miss"),
    Case("miss", options={"r2": 2}, label="miss-mini"),
    Case("bone-col"),
    Case("bone-row"),
)


class Net(nn.Module):
    """One linear layer of each given shape, not meant to be run in sequence."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers[0](x)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64).to(dtype)


def linear(
    d: int,
    k: int,
    *,
    bias: bool = True,
    conv1d: bool = False,
    dtype: torch.dtype = torch.float32,
    seed: int = 1,
) -> nn.Module:
    if conv1d:
        module: nn.Module = Conv1D(d, k).to(dtype)
        weight = draw(k, d, seed=seed, dtype=dtype)
    else:
        module = nn.Linear(k, d, bias=bias, dtype=dtype)
        weight = draw(d, k, seed=seed, dtype=dtype)
    module.weight.data.copy_(weight / k**0.5)
    if module.bias is not None:
        module.bias.data.copy_(draw(d, seed=seed + 1, dtype=dtype))
    return module


def adapted(
    case: Case,
    d: int = 12,
    k: int = 8,
    *,
    random: bool = True,
    dropout: float = 0.0,
    seed: int = 3,
    **base: Any,
) -> AdaptedModel:
    """An adapter on one layer, factors random unless `random` is false."""
    torch.manual_seed(0)
    model = adapt(
        Net(linear(d, k, **base)),
        method=case.method,
        rank=case.rank,
        alpha=None,
        targets="all-linear",
        heads=(),
        base_fingerprint="base",
        seed=seed,
        dropout=dropout,
        options=case.options,
    )
    if random:
        randomise(model)
    return model


def randomise(model: AdaptedModel, seed: int = 7, size: float = 0.5) -> None:
    """Adds noise to every factor and head, so that nothing is zero by construction."""
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters().values()):
            noise = draw(*parameter.shape, seed=seed + i, dtype=parameter.dtype)
            parameter.add_(size * noise)


def only_layer(model: AdaptedModel):
    (layer,) = model.layers.values()
    return layer


def factor_tensors(model: AdaptedModel) -> dict[str, torch.Tensor]:
    return {name: value.detach() for name, value in only_layer(model).factors().items()}
