"""Siblings: layers that are given the same input, such as the projections of one attention.

The first of them to be called computes all of them by one op, which reads the input once for all
factors and sums its gradient in place; the others find their output waiting.
"""

from collections.abc import Mapping, Sequence

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
        # layer's name -> what its output was made of, and the output
        self._waiting: dict[str, tuple[_MadeOf, Tensor]] = {}

    def output(self, layer: LoraLayer, x: Tensor) -> Tensor:
        """The output of one of the layers."""
        held = self._waiting.pop(layer.layer.name, None)
        if held is not None and held[0].same(_MadeOf(layer, x)):
            return held[1]
        # what still waits is let go before there is more
        self._waiting = {}
        if any(member.disabled or not member.plain() for member in self.layers):
            return lora_outputs((layer,), x)[0]
        for member, y in zip(self.layers, lora_outputs(self.layers, x), strict=True):
            self._waiting[member.layer.name] = (_MadeOf(member, x), y)
        return self._waiting.pop(layer.layer.name)[1]


class _MadeOf:
    """All that a layer's output depends on, as far as it can change: tensors, and other facts."""

    def __init__(self, layer: LoraLayer, x: Tensor) -> None:
        base = layer.base
        weights = (layer.A.weight, layer.B.weight, base.weight, base.bias)
        self.tensors = (x, *weights, layer.dropout.keys)
        self.facts = (
            torch.is_grad_enabled(),
            compute_dtype(x),
            layer.training,
            # one that began to need a gradient has none in an output of before
            *(t.requires_grad for t in self.tensors if isinstance(t, Tensor)),
            *(t._version for t in self.tensors if isinstance(t, Tensor) and not t.is_inference()),
        )

    def same(self, other: "_MadeOf") -> bool:
        """Of the same tensors, not of equal ones."""
        return self.facts == other.facts and all(
            a is b for a, b in zip(self.tensors, other.tensors, strict=True)
        )


def join_siblings(layers: Mapping[str, AdapterLayer]) -> None:
    """Makes LoRA layers of one input siblings, which also share their dropout's mask."""
    for parent in sorted({name.rpartition(".")[0] for name in layers}):
        for names in ONE_INPUT:
            found = [layers.get(f"{parent}.{name}" if parent else name) for name in names]
            members = [layer for layer in found if type(layer) is LoraLayer]
            if len(members) > 1 and len({member.layer.inp for member in members}) == 1:
                _join(members)


def _join(members: Sequence[LoraLayer]) -> None:
    together = Siblings(members)
    for member in members:
        member.together = together
        member.dropout.stream = members[0].dropout.stream
