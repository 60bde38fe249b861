"""Which linear layers of a model an adapter goes on."""

import re
from collections import Counter
from collections.abc import Iterator, Sequence

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fedlora.adapters.base import AdapterLayer
from fedlora.errors import ConfigError


def find_targets(
    model: nn.Module, targets: Sequence[str] | str, heads: Sequence[str]
) -> dict[str, nn.Module]:
    """The linear layers that `targets` names, by full name; heads and output excluded.

    Raises:
        ConfigError: a pattern that matches nothing, with what exists.
    """
    get_output = getattr(model, "get_output_embeddings", None)
    output = get_output() if get_output is not None else None
    candidates = {
        name: module
        for name, module in linear_layers(model)
        if module is not output and not any(name == h or name.startswith(h + ".") for h in heads)
    }
    if targets == "all-linear":
        if not candidates:
            raise ConfigError("the model has no linear layer to adapt")
        return candidates
    chosen: dict[str, nn.Module] = {}
    problems = []
    for pattern in [targets] if isinstance(targets, str) else targets:
        hits = {name: m for name, m in candidates.items() if _matches(pattern, name)}
        if not hits:
            endings = Counter(name.rpartition(".")[2] for name in candidates)
            exist = ", ".join(f"{ending} ({count})" for ending, count in endings.most_common())
            problems.append(
                f"adapter.targets: {pattern!r} matches no linear layer; the model has {exist}"
            )
        chosen.update(hits)
    if problems:
        raise ConfigError(*problems)
    return chosen


def linear_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every nn.Linear and Conv1D by full name, seen through adapters that are attached."""
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if isinstance(module, AdapterLayer):
            inside = (*inside, name + ".")
            yield name, module.base
        elif isinstance(module, nn.Linear | Conv1D) and not name.startswith(inside or ("\0",)):
            yield name, module


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """(d, k) = (out, in) of an nn.Linear or Conv1D."""
    weight = linear_weight(module)
    return weight.shape[0], weight.shape[1]


def linear_weight(module: nn.Module) -> Tensor:
    """The weight (d, k) of an nn.Linear or Conv1D."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.detach().T if isinstance(module, Conv1D) else weight.detach()


def tied_to(model: nn.Module, parameter: nn.Parameter, owner: str) -> list[str]:
    """Other names of `parameter` in the model, those that begin with `owner` left out."""
    return [
        name
        for name, other in model.named_parameters(remove_duplicate=False)
        if other is parameter and not name.startswith(owner)
    ]


def _matches(pattern: str, name: str) -> bool:
    if name == pattern or name.endswith("." + pattern):
        return True
    try:
        return re.fullmatch(pattern, name) is not None
    except re.error:
        return False
