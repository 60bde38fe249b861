"""Siblings: layers that are given the same input, such as the projections of one attention.

The first of them to be called computes all of them by one op, which reads the input once for all
factors and sums its gradient in place; the others find their output waiting.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fedlora.adapters.base import AdapterLayer
from fedlora.adapters.lora import LoraLayer, lora_outputs
from fedlora.ops.autocast import compute_dtype

# names of layers within a module that hands all of them one input, in models of transformers
ONE_INPUT = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q_lin", "k_lin", "v_lin"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("wi_0", "wi_1"),
)


class Siblings:
    """LoRA layers of one input; see `fedlora.adapters.lora.Together`.

    An output waits for the call of its layer with the same tensor. Where that is not what comes
    next, the layer is computed anew: a wrong guess costs time, and is never a wrong answer.
    """

    def __init__(self, layers: Sequence[LoraLayer]) -> None:
        self.layers = tuple(layers)
        self._made_of: tuple[Any, ...] = ()
        self._waiting: dict[str, Tensor] = {}

    def output(self, layer: LoraLayer, x: Tensor) -> Tensor:
        """The output of one of the layers."""
        name = layer.layer.name
        made_of = self._all(x)
        if name in self._waiting and _same(made_of, self._made_of):
            y = self._waiting.pop(name)
        else:
            # what still waits is let go before there is more
            self._waiting = {}
            apart = any(member.disabled or not member.plain() for member in self.layers)
            members = (layer,) if apart else self.layers
            ys = lora_outputs(members, x)
            self._waiting = {m.layer.name: y for m, y in zip(members, ys, strict=True)}
            y = self._waiting.pop(name)
        self._made_of = made_of if self._waiting else ()
        return y

    def _all(self, x: Tensor) -> tuple[Any, ...]:
        """All that an output depends on, as far as it can change: tensors, and other facts."""
        tensors: list[Any] = [x]
        facts: list[Any] = [torch.is_grad_enabled(), compute_dtype(x)]
        for layer in self.layers:
            tensors += [layer.A.weight, layer.B.weight, layer.dropout.keys]
            facts.append(layer.training)
        facts += [t._version for t in tensors if t is not None and not t.is_inference()]
        return (*tensors, tuple(facts))


def _same(one: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    """Of the same tensors, not of equal ones."""
    return (
        len(one) == len(other)
        and all(a is b for a, b in zip(one[:-1], other[:-1], strict=True))
        and one[-1] == other[-1]
    )


def join_siblings(layers: Mapping[str, AdapterLayer]) -> None:
    """Makes LoRA layers of one input siblings, which also share their dropout's mask."""
    for name, layer in layers.items():
        parent, _, child = name.rpartition(".")
        for names in ONE_INPUT:
            if child != names[0]:
                continue
            found = [layers.get(f"{parent}.{other}" if parent else other) for other in names]
            members = [m for m in found if type(m) is LoraLayer and m.layer.inp == layer.layer.inp]
            if len(members) > 1 and type(layer) is LoraLayer:
                _join(members)


def _join(members: Sequence[LoraLayer]) -> None:
    together = Siblings(members)
    for member in members:
        member.together = together
        member.dropout.stream = members[0].dropout.stream
