"""PiSSA: LoRA that starts at the principal singular directions of W0.

Meng, Wang & Zhang, "PiSSA: Principal Singular Values and Singular Vectors Adaptation of
Large Language Models", https://arxiv.org/abs/2404.02948, section 3.

Differs from the paper: W0 is not replaced by the residual W0 - s B0 A0. The initial factors
are kept as a frozen basis and subtracted in the forward pass, so that one W0 in any dtype
serves every adapter and the change s (B A - B0 A0) is relative to W0.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedlora.adapter import LayerSpec
from fedlora.adapters.base import AdapterLayer, Basis, Method
from fedlora.adapters.leaves import leaf_weight, linear_leaf
from fedlora.adapters.svd import canonical_signs


class Pissa(Method):
    """Factors A (r, k) and B (d, r); basis A0, B0 of the same shapes, where they start."""

    name = "pissa"
    bilinear_factors = ("B", "A")
    basis_provenance = "derived"

    def scale(self, rank: int, alpha: float) -> float:
        return alpha / rank

    def default_alpha(self, rank: int) -> float:
        return float(rank)

    def basis_shapes(self, layers: tuple[LayerSpec, ...]) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {}
        for layer in layers:
            shapes[f"{layer.name}.A0"] = (layer.rank, layer.inp)
            shapes[f"{layer.name}.B0"] = (layer.out, layer.rank)
        return shapes

    def make_basis(
        self,
        layers: tuple[LayerSpec, ...],
        weight: Callable[[str], Tensor],
        seed: int,
        options: Mapping[str, Any],
    ) -> dict[str, Tensor]:
        basis = {}
        for layer in layers:
            a, b = principal_factors(weight(layer.name), layer.rank, layer.scale)
            basis[f"{layer.name}.A0"] = a.to("cpu", torch.float32)
            basis[f"{layer.name}.B0"] = b.to("cpu", torch.float32)
        return basis

    def factor_shapes(self, layer: LayerSpec) -> dict[str, tuple[int, ...]]:
        return {"A": (layer.rank, layer.inp), "B": (layer.out, layer.rank)}

    def attach(
        self,
        base: nn.Module,
        layer: LayerSpec,
        basis: Basis,
        *,
        seed: int,
        dropout: float,
        options: Mapping[str, Any],
    ) -> "PissaLayer":
        own = {name: basis[name] for name in (f"{layer.name}.A0", f"{layer.name}.B0")}
        return PissaLayer(base, layer, self, own, dropout)

    def lowrank(
        self, layer: LayerSpec, factors: Mapping[str, Tensor], basis: Basis
    ) -> tuple[Tensor, Tensor]:
        a, b = factors["A"], factors["B"]
        a0, b0 = basis[f"{layer.name}.A0"].to(a), basis[f"{layer.name}.B0"].to(b)
        return layer.scale * torch.cat([b, -b0], 1), torch.cat([a, a0], 0)


class PissaLayer(AdapterLayer):
    """y = base(x) + s (B A - B0 A0) dropout(x)."""

    def __init__(
        self, base: nn.Module, layer: LayerSpec, method: Method, basis: Basis, dropout: float
    ) -> None:
        super().__init__(base, layer, method, basis, dropout)
        self.A = linear_leaf(self.basis[f"{layer.name}.A0"])  # (r, k)
        self.B = linear_leaf(self.basis[f"{layer.name}.B0"])  # (d, r)

    def factors(self) -> dict[str, nn.Parameter]:
        return {"A": leaf_weight(self.A), "B": leaf_weight(self.B)}

    def adapted(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        x = self.dropout(x).to(self.factor_dtype)
        a0, b0 = self.basis[f"{self.layer.name}.A0"], self.basis[f"{self.layer.name}.B0"]
        change: Tensor = self.B(self.A(x)) - F.linear(F.linear(x, a0), b0)
        return y + (self.layer.scale * change).to(y.dtype)


def principal_factors(weight: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """(A0 (r, k), B0 (d, r)) with scale B0 A0 = the best rank-r approximation of `weight`.

    Signs are canonical (see `canonical_signs`).
    """
    weight = weight if weight.dtype == torch.float64 else weight.float()
    u, sigma, vh = torch.linalg.svd(weight, full_matrices=False)
    u, vh = canonical_signs(u[:, :rank], vh[:rank])
    root = (sigma[:rank] / scale).sqrt()
    return root[:, None] * vh, root * u
