"""What is required of every tensor and JSON value that a strategy makes."""

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fedlora.strategies.conformance.law import require
from fedlora.wire import encode_json


def whole(tensors: Mapping[str, Tensor], shapes: Mapping[str, Any], place: str) -> None:
    """Exactly these tensors, each of its shape, float32 and finite."""
    for name in sorted(shapes.keys() ^ tensors.keys()):
        require(False, f"{place} {'lacks' if name in shapes else 'has a strange'} {name}", "none")
    for name, tensor in tensors.items():
        sound(name, tensor, place)
        shape = tuple(tensor.shape)
        require(shape == tuple(shapes[name]), f"{name} of {place} is {shape}", f"{shapes[name]}")


def sound(name: str, tensor: Any, place: str) -> None:
    """A plain float32 tensor of finite numbers."""
    kind = type(tensor).__name__
    require(isinstance(tensor, Tensor), f"{name} of {place} is a {kind}", "a tensor")
    dtype = tensor.dtype
    require(dtype == torch.float32, f"{name} of {place} is {dtype}", "torch.float32")
    require(bool(torch.isfinite(tensor).all()), f"{name} of {place} is not finite", "finite")
    require(not tensor.requires_grad, f"{name} of {place} requires grad", "a plain tensor")


def json_safe(value: Mapping[str, Any], place: str) -> None:
    """JSON that reads back as it was written."""
    try:
        same = json.loads(encode_json(dict(value))) == dict(value)
    except (TypeError, ValueError) as e:
        require(False, f"{place} is not JSON ({e})", "numbers, texts, lists and dicts")
    else:
        require(same, f"{place} changes when it is written as JSON", "text keys, no tuples")
