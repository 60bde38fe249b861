"""AdapterSpec and AdapterState: what an adapter is, apart from any model object.

The spec says which layers are adapted and how; its digest is what peers must agree on.
The state is the spec plus named tensors. A tensor is called `<layer>.<factor>`, e.g.
`model.layers.0.self_attn.q_proj.A`; a trained head keeps its own parameter names.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from fedlora.errors import AdapterError

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class LayerSpec:
    """One adapted linear layer: `out` x `inp` (d x k), its rank and its scale s.

    `scale` is part of the spec and not derived from `rank`, so that a client that holds
    only the leading slots of a factor still applies the scale of the whole. `tile` is the
    height of a factor that is repeated along the output (MiSS-mini); 0 for none.
    """

    name: str
    out: int
    inp: int
    rank: int
    scale: float
    tile: int = 0


@dataclass(frozen=True)
class AdapterSpec:
    """Method, layers, heads and base of an adapter.

    Attributes:
        method: name of the adapter method, e.g. "lora".
        rank: rank asked for; `layers` holds what each layer got.
        alpha: numerator of the scale.
        layers: adapted layers, sorted by name.
        heads: names of the modules that are trained in full beside the adapter.
        head_shapes: shape of every parameter of the heads, by full name.
        base_fingerprint: SHA-256 over the frozen base weights.
        seed: seed of the frozen random bases and of the initial factors.
        options: the method's own options.
        basis_digest: SHA-256 over the frozen tensors that are not base weights; a client
            whose basis differs would average numbers that mean something else.
    """

    method: str
    rank: int
    alpha: float
    layers: tuple[LayerSpec, ...]
    heads: tuple[str, ...]
    head_shapes: Mapping[str, tuple[int, ...]]
    base_fingerprint: str
    seed: int
    options: Mapping[str, Any] = field(default_factory=dict)
    basis_digest: str = ""

    def to_json(self) -> dict[str, Any]:
        """A JSON value from which `from_json` makes an equal spec."""
        value = dataclasses.asdict(self)
        value["layers"] = [dataclasses.astuple(layer) for layer in self.layers]
        value["heads"] = list(self.heads)
        value["head_shapes"] = {k: list(v) for k, v in sorted(self.head_shapes.items())}
        return value

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "AdapterSpec":
        """The spec written by `to_json`.

        Raises:
            AdapterError: a field is missing, unknown or of the wrong type.
        """
        try:
            fields = dict(value)
            fields["layers"] = tuple(LayerSpec(*layer) for layer in fields["layers"])
            fields["heads"] = tuple(fields["heads"])
            fields["head_shapes"] = {k: tuple(v) for k, v in fields["head_shapes"].items()}
            return cls(**fields)
        except (KeyError, TypeError, ValueError, AttributeError) as e:
            raise AdapterError(
                f"adapter spec is not readable ({e}); expected the object that fedlora writes "
                "into adapter_config.json"
            ) from e

    def digest(self) -> str:
        """SHA-256 of the canonical JSON of the spec; made once."""
        return self._digest

    @functools.cached_property
    def _digest(self) -> str:
        text = json.dumps(self.to_json(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def layer(self, name: str) -> LayerSpec:
        """The layer called `name`; KeyError when it is not adapted."""
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise KeyError(name)


@dataclass(frozen=True)
class AdapterState:
    """A spec and its tensors; supports `+`, `-` and scaling, tensor by tensor."""

    spec: AdapterSpec
    tensors: Tensors

    def __add__(self, other: "AdapterState") -> "AdapterState":
        return AdapterState(self.spec, combine(self.tensors, other.tensors, 1.0))

    def __sub__(self, other: "AdapterState") -> "AdapterState":
        return AdapterState(self.spec, combine(self.tensors, other.tensors, -1.0))

    def scaled(self, factor: float) -> "AdapterState":
        """Every tensor times `factor`."""
        return AdapterState(self.spec, {k: v * factor for k, v in self.tensors.items()})


def combine(left: Tensors, right: Tensors, factor: float) -> dict[str, torch.Tensor]:
    """Left + factor * right, for equal names and shapes.

    Raises:
        AdapterError: names or shapes differ (nothing is broadcast).
    """
    if left.keys() != right.keys():
        odd = sorted(left.keys() ^ right.keys())
        raise AdapterError(f"adapters hold different tensors: {', '.join(odd[:4])} in only one")
    for name, tensor in left.items():
        if tensor.shape != right[name].shape:
            raise AdapterError(
                f"{name} has shapes {tuple(tensor.shape)} and {tuple(right[name].shape)}; "
                "expected equal shapes"
            )
    return {k: v + factor * right[k] for k, v in left.items()}


def split_name(name: str) -> tuple[str, str]:
    """`layer.factor` -> (layer, factor)."""
    layer, _, factor = name.rpartition(".")
    return layer, factor


def tensors_digest(tensors: Tensors) -> str:
    """SHA-256 over name, shape and float32 bytes of each tensor, sorted by name."""
    sha = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().to("cpu", torch.float32).contiguous()
        sha.update(f"{name}{tuple(tensor.shape)}".encode())
        sha.update(tensor.numpy().tobytes())
    return sha.hexdigest()


class MethodTraits(Protocol):
    """What an aggregation strategy may know of an adapter method.

    Attributes:
        affine: the weight change is affine in the trained factors, so that averaging
            the factors averages the change exactly.
        bilinear_factors: (zero-initialised factor, other factor) when the change is linear
            in each of the two; None otherwise.
        product: the change is s B A with B (d, r), A (r, k), and nothing else.
    """

    name: str
    affine: bool
    bilinear_factors: tuple[str, str] | None
    product: bool

    def factor_shapes(self, layer: LayerSpec) -> dict[str, tuple[int, ...]]:
        """Shape of every trained factor of `layer`."""
        ...

    def resize(
        self, factor: str, tensor: torch.Tensor, old: LayerSpec, new: LayerSpec
    ) -> torch.Tensor:
        """`factor` of a layer of rank `old.rank`, embedded in or cut to `new.rank`."""
        ...

    def fresh(self, layer: LayerSpec, seed: int) -> dict[str, torch.Tensor]:
        """The factors of a new adapter, float32, drawn from the seed alone."""
        ...


def trained_shapes(
    spec: AdapterSpec, traits: MethodTraits, factors: Iterable[str] | None = None
) -> dict[str, tuple[int, ...]]:
    """Shapes of the named factors of every layer and of the heads, sorted by name.

    Args:
        spec: the adapter.
        traits: its method.
        factors: factor names to keep; None keeps all.
    """
    wanted = None if factors is None else set(factors)
    shapes = {
        f"{layer.name}.{factor}": shape
        for layer in spec.layers
        for factor, shape in traits.factor_shapes(layer).items()
        if wanted is None or factor in wanted
    }
    shapes.update(spec.head_shapes)
    return dict(sorted(shapes.items()))


def with_rank(spec: AdapterSpec, rank: int) -> AdapterSpec:
    """`spec` for a client that holds the leading `rank` slots of each layer.

    Scales stay those of the whole adapter.
    """
    if rank == spec.rank:
        return spec
    layers = tuple(dataclasses.replace(layer, rank=min(rank, layer.rank)) for layer in spec.layers)
    return dataclasses.replace(spec, rank=rank, layers=layers)
