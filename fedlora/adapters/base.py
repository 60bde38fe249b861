"""Method and AdapterLayer: what every adapter method must offer.

A `Method` is stateless: it plans layers, makes the frozen basis, says the shapes of the
trained factors and attaches an `AdapterLayer` to one linear layer. The layer owns the
trained factors, always inside leaf modules without buffers, so that per-sample gradients
can be taken by hooks on those leaves. The base weight W0 is never changed by training:
many adapters can stand on one base.

Shapes: W0 and the weight change are (d, k) = (out, in), also for transformers' Conv1D,
which stores (in, out). The weight change includes the scale and is relative to W0.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedlora.adapter import LayerSpec
from fedlora.adapters.leaves import KeyedDropout
from fedlora.errors import AdapterError, ConfigError, near_miss

Basis = Mapping[str, Tensor]
Provenance = Literal["none", "seed", "derived"]


class Method(ABC):
    """One adapter variant.

    Attributes:
        name: as in `adapter.method`.
        uses_alpha: the weight change has a scale made of `adapter.alpha`.
        affine: the weight change is affine in the trained factors, so that averaging
            factors averages the change.
        bilinear_factors: (zero-initialised factor, other factor) when the change is their
            product, plus a constant for a method with a derived basis; None otherwise.
        product: the change is s B A with B (d, r), A (r, k), and nothing else.
        additive: y = base(x) + f(x); otherwise the adapter needs W0 in its forward pass.
        basis_provenance: where frozen tensors come from: a seed (each client makes them and
            compares digests) or derived from W0 (one machine makes them and sends them, for
            decompositions differ between machines).
        options: option name -> default.
    """

    name: str
    uses_alpha: bool = True
    affine: bool = False
    bilinear_factors: tuple[str, str] | None = None
    product: bool = False
    additive: bool = True
    basis_provenance: Provenance = "none"
    options: ClassVar[Mapping[str, Any]] = {}

    def check_options(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """`options` completed by the defaults.

        Raises:
            ConfigError: an unknown option, or a value of another type than the default.
        """
        for key, value in options.items():
            if key not in self.options:
                known = ", ".join(self.options) or "none"
                raise ConfigError(
                    f"adapter.options.{key} is not known to method {self.name!r}"
                    f"{near_miss(key, self.options)}; known: {known}"
                )
            default = self.options[key]
            if isinstance(default, float) and type(value) is int:
                continue
            if type(value) is not type(default):
                raise ConfigError(
                    f"adapter.options.{key} = {value!r} is a {type(value).__name__}; "
                    f"expected a {type(default).__name__}"
                )
        return {**self.options, **options}

    def scale(self, rank: int, alpha: float) -> float:
        """The factor s in the weight change; 1 for methods without a scale."""
        return 1.0

    def default_alpha(self, rank: int) -> float:
        """`adapter.alpha` when the job does not give one."""
        return 2.0 * rank

    def plan(
        self,
        shapes: Mapping[str, tuple[int, int]],
        rank: int,
        alpha: float,
        options: Mapping[str, Any],
    ) -> tuple[LayerSpec, ...]:
        """One spec per layer, sorted by name; sees the whole model.

        Args:
            shapes: layer name -> (d, k).

        Raises:
            ConfigError: every layer whose shape does not allow the rank.
        """
        problems = [
            f"adapter.rank = {rank} does not fit layer {name} of shape ({d}, {k}): "
            f"{reason}; choose a smaller rank or other targets"
            for name, (d, k) in sorted(shapes.items())
            if (reason := self.misfit(d, k, rank, options))
        ]
        if problems:
            raise ConfigError(*problems[:5])
        return tuple(
            LayerSpec(name, d, k, rank, self.scale(rank, alpha))
            for name, (d, k) in sorted(shapes.items())
        )

    def misfit(self, d: int, k: int, rank: int, options: Mapping[str, Any]) -> str:
        """Why `rank` cannot be used on a (d, k) layer, or an empty string."""
        most = min(d, k)
        return f"the rank is larger than {most}" if rank > most else ""

    def make_basis(
        self,
        layers: tuple[LayerSpec, ...],
        weight: Callable[[str], Tensor],
        seed: int,
        options: Mapping[str, Any],
    ) -> dict[str, Tensor]:
        """Frozen tensors beside W0, float32 on the CPU; none by default.

        Args:
            weight: layer name -> W0 (d, k).
            seed: the run's seed.
        """
        return {}

    def basis_shapes(self, layers: tuple[LayerSpec, ...]) -> dict[str, tuple[int, ...]]:
        """Shapes of a derived basis (one that is sent); empty for all others."""
        return {}

    @abstractmethod
    def factor_shapes(self, layer: LayerSpec) -> dict[str, tuple[int, ...]]:
        """Shape of every trained factor of `layer`."""

    @abstractmethod
    def attach(
        self,
        base: nn.Module,
        layer: LayerSpec,
        basis: Basis,
        *,
        seed: int,
        dropout: float,
        options: Mapping[str, Any],
    ) -> "AdapterLayer":
        """The adapted layer that takes the place of `base`, with initial factors.

        Args:
            base: nn.Linear or Conv1D.
            basis: the whole model's frozen tensors (see `make_basis`).
            seed: the run's seed; factors are drawn from streams named by layer and factor.
        """

    def fresh(self, layer: LayerSpec, seed: int) -> dict[str, Tensor]:
        """The factors of a new adapter, float32 on the CPU, drawn from the seed alone.

        Raises:
            AdapterError: they depend on the base as well.
        """
        raise AdapterError(
            f"method {self.name!r} cannot start anew without its base; choose method lora"
        )

    def lowrank(
        self, layer: LayerSpec, factors: Mapping[str, Tensor], basis: Basis
    ) -> tuple[Tensor, Tensor] | None:
        """(L (d, R), Q (R, k)) with weight change = L Q, computed without a model.

        None when the change is not of low rank or needs W0.
        """
        return None

    def resize(self, factor: str, tensor: Tensor, old: LayerSpec, new: LayerSpec) -> Tensor:
        """`factor` of rank `old.rank` cut to, or embedded with equal change in, `new.rank`.

        Raises:
            AdapterError: the method has no exact embedding between ranks.
        """
        if old.rank == new.rank:
            return tensor
        raise AdapterError(
            f"method {self.name!r} cannot change rank from {old.rank} to {new.rank} exactly; "
            "give every client the same rank"
        )


class AdapterLayer(nn.Module, ABC):
    """A frozen linear layer with one adapter on it."""

    def __init__(
        self, base: nn.Module, layer: LayerSpec, method: Method, basis: Basis, dropout: float
    ) -> None:
        super().__init__()
        self.base = base
        self.layer = layer
        self.method = method
        self._original: Tensor | None = None
        # frozen tensors this layer needs; plain attributes, for buffers would be saved and cast
        self.basis = {
            name: tensor.to(self.weight.device, self.factor_dtype) for name, tensor in basis.items()
        }
        self.dropout = KeyedDropout(dropout, layer.name)
        self.disabled = False
        # a frozen change of W0: (L (d, rho), Q (rho, k)), or (d, k) where that is smaller
        self.fold: tuple[Tensor, ...] = ()

    @property
    def transposed(self) -> bool:
        """The base stores its weight as (in, out)."""
        return not isinstance(self.base, nn.Linear)

    @property
    def stored_weight(self) -> nn.Parameter:
        """The base's own parameter."""
        weight = self.base.weight
        assert isinstance(weight, nn.Parameter)
        return weight

    @property
    def weight(self) -> Tensor:
        """W0 (d, k), also while merged."""
        weight = self.stored_weight if self._original is None else self._original
        return weight.T if self.transposed else weight

    @property
    def bias(self) -> Tensor | None:
        """The base's bias (d,), if it has one."""
        bias = self.base.bias
        return bias if isinstance(bias, Tensor) else None

    @property
    def factor_dtype(self) -> torch.dtype:
        """float32, or float64 on a float64 base."""
        return torch.float64 if self.weight.dtype == torch.float64 else torch.float32

    @abstractmethod
    def factors(self) -> dict[str, nn.Parameter]:
        """Factor name -> parameter, with the shapes of `Method.factor_shapes`."""

    @abstractmethod
    def adapted(self, x: Tensor) -> Tensor:
        """Output (..., d) of base and adapter for x (..., k)."""

    def takes_any_shape(self) -> bool:
        """Whether `adapted` may be given more dimensions than (batch, tokens, features)."""
        return False

    def lowrank(self) -> tuple[Tensor, Tensor] | None:
        """See `Method.lowrank`, for the current factors."""
        return self.method.lowrank(self.layer, self.factors(), self.basis)

    def delta_weight(self) -> Tensor:
        """The weight change (d, k) relative to W0, at least float32."""
        product = self.lowrank()
        assert product is not None, "a method without lowrank() defines delta_weight()"
        return product[0] @ product[1]

    def forward(self, x: Tensor) -> Tensor:
        if self.disabled or self._original is not None:
            y: Tensor = self.base(x)
            return y
        if x.dim() <= 3 or self.takes_any_shape():
            y = self.adapted(x)
        else:
            # per-sample norms of a linear leaf exist for (batch, tokens, features) only
            y = self.adapted(x.flatten(1, -2)).reshape(*x.shape[:-1], self.layer.out)
        if not self.fold:
            return y
        h = x.to(self.factor_dtype)
        for factor in reversed(self.fold):
            h = F.linear(h, factor)
        return y + h.to(y.dtype)

    def set_fold(self, left: Tensor, right: Tensor) -> None:
        """From now on the base is W0 + left @ right; left (d, rho), right (rho, k)."""
        d, rho = left.shape
        if rho == 0:
            self.fold = ()
            return
        factors = (
            (left, right)
            if rho * (d + right.shape[1]) < left.shape[0] * right.shape[1]
            else (left.double() @ right.double(),)
        )
        self.fold = tuple(f.to(self.weight.device, self.factor_dtype) for f in factors)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "AdapterLayer":
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.basis = {name: tensor.to(self.weight.device) for name, tensor in self.basis.items()}
        self.fold = tuple(tensor.to(self.weight.device) for tensor in self.fold)
        return self

    def merge(self) -> None:
        """Adds the change to the base weight; keeps W0 so that unmerging is bit-exact."""
        if self._original is not None:
            return
        with torch.no_grad():
            merged = self.weight.to(self.factor_dtype) + self.delta_weight()
            if self.fold:
                left, *right = self.fold
                merged += left @ right[0] if right else left
            self._original = self.stored_weight.detach().clone()
            stored = merged.T if self.transposed else merged
            self.stored_weight.copy_(stored)

    def unmerge(self) -> None:
        """Restores W0."""
        if self._original is not None:
            with torch.no_grad():
                self.stored_weight.copy_(self._original)
            self._original = None
