"""The named arrays of somebody else's LoRA app, read as an adapter.

Names are those of `peft.get_peft_model_state_dict` (`<layer>.lora_A.weight`), of a PEFT
model's own parameters (`<layer>.lora_A.default.weight`), or fedlora's (`<layer>.A`). Every
other array is the parameter of a head.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from fedlora.adapter import AdapterSpec
from fedlora.adapters.base import Method
from fedlora.errors import ConfigError

Shapes = Mapping[str, tuple[int, ...]]

_PEFT = re.compile(
    r"(?:base_model\.model\.)?(?P<layer>.+)\.lora_(?P<factor>[AB])(?:\.[^.]+)?\.weight"
)
_OWN = re.compile(r"(?P<layer>.+)\.(?P<factor>[AB])")


@dataclass(frozen=True)
class Naming:
    """Whose arrays they are, and what they are called here.

    Attributes:
        names: the app's name -> ours, in the app's order.
        peft: factors are called lora_A and lora_B.
    """

    names: Mapping[str, str]
    peft: bool

    def factor(self, name: str) -> str:
        """What the app calls a factor."""
        return f"lora_{name}" if self.peft else name


def read_arrays(
    shapes: Shapes, method: Method, rank: int | None, alpha: float | None, seed: int
) -> tuple[AdapterSpec, Naming]:
    """The adapter that arrays of these shapes are.

    Args:
        shapes: name -> shape.
        method: lora or rslora.
        rank: of every layer; None takes what the arrays have.
        alpha: numerator of the scale; None takes the rank.
        seed: seed of whatever the strategy draws.

    Raises:
        ConfigError: no LoRA factors, more than one adapter, or factors that do not fit.
    """
    factors = {key: match for key in shapes if (match := _PEFT.fullmatch(key))}
    peft = bool(factors)
    if not peft:
        found = {key: match for key in shapes if (match := _OWN.fullmatch(key))}
        factors = {
            key: m
            for key, m in found.items()
            if {f"{m['layer']}.A", f"{m['layer']}.B"} <= shapes.keys()
        }
    if not factors:
        raise ConfigError(
            f"none of the {len(shapes)} initial arrays is a LoRA factor; expected names such as "
            "base_model.model.<layer>.lora_A.weight and .lora_B.weight, as "
            "peft.get_peft_model_state_dict gives them"
        )
    names: dict[str, str] = {}
    for key in shapes:
        match = factors.get(key)
        if match is None and "lora_" in key:
            raise ConfigError(
                f"array {key} belongs to a variant of LoRA (DoRA, embeddings, biases) whose "
                "change is not s B A of a linear layer; train plain LoRA on linear layers"
            )
        own = f"{match['layer']}.{match['factor']}" if match else key
        if own in names.values():
            raise ConfigError(f"arrays {key} and another are both {own}; send one adapter only")
        names[key] = own
    own_shapes = {own: tuple(shapes[key]) for key, own in names.items()}
    layers: dict[str, tuple[int, int]] = {}
    for match in factors.values():
        layer = match["layer"]
        a, b = own_shapes.get(f"{layer}.A", ()), own_shapes.get(f"{layer}.B", ())
        rank = rank or (a[0] if a else None)
        if not (len(a) == len(b) == 2 and a[0] == b[1] == rank):
            raise ConfigError(
                f"factors A and B of layer {layer} have shapes {a} and {b}; expected "
                f"({rank}, k) and (d, {rank})"
            )
        layers[layer] = (b[0], a[1])
    assert rank is not None
    heads = {key: own_shapes[key] for key in shapes if key not in factors}
    alpha = float(rank) if alpha is None else float(alpha)
    spec = AdapterSpec(
        method=method.name,
        rank=rank,
        alpha=alpha,
        layers=method.plan(layers, rank, alpha, {}),
        heads=tuple(sorted({name.rpartition(".")[0] or name for name in heads})),
        head_shapes=heads,
        base_fingerprint="",
        seed=seed,
    )
    return spec, Naming(names, peft)
