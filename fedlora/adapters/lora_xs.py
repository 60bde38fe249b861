"""LoRA-XS: a small square matrix trained between frozen singular directions of W0.

Bałazy, Banaei, Aberer & Tabor, "LoRA-XS: Low-Rank Adaptation with Extremely Small Number of
Parameters", https://arxiv.org/abs/2405.17604, section 3. Weight change s B R A with B = U_r and
A = diag(sigma_r) V_r^T from the truncated SVD of W0, and R from N(0, 1e-10). The paper writes
W0 as (in, out), so that its A is our A^T and its B our B^T.

Option `basis` = "random" is the ablation without W0: random B and A. Differs from the paper,
where these are Kaiming-uniform: here B^T B = A A^T = I, so that with s = 1 a gradient step on R
moves the weight by the orthogonal projection of its full gradient.
"""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedlora.adapter import LayerSpec
from fedlora.adapters.base import AdapterLayer, Basis, Method
from fedlora.adapters.leaves import leaf_weight, linear_leaf
from fedlora.adapters.lora import resize_slots
from fedlora.adapters.svd import truncated_svd
from fedlora.errors import ConfigError, near_miss
from fedlora.seeds import generator

BASES = ("svd", "random")
INITIAL_STD = 1e-5


class LoraXs(Method):
    """Factor R (r, r), close to zero; basis A (r, k) and B (d, r) of every layer.

    Singular directions come in order, so a client of smaller rank takes the leading rows of A
    and columns of B, and its R is the leading block of the whole.
    """

    name = "lora-xs"
    affine = True
    basis_provenance = "derived"
    options: ClassVar[Mapping[str, Any]] = {"basis": "svd"}

    def check_options(self, options: Mapping[str, Any]) -> dict[str, Any]:
        checked = super().check_options(options)
        if checked["basis"] not in BASES:
            raise ConfigError(
                f'adapter.options.basis = "{checked["basis"]}" is not known to method '
                f"{self.name!r}{near_miss(checked['basis'], BASES)}; known: {', '.join(BASES)}"
            )
        return checked

    def scale(self, rank: int, alpha: float) -> float:
        return alpha / rank

    def default_alpha(self, rank: int) -> float:
        return float(rank)

    def basis_shapes(self, layers: tuple[LayerSpec, ...]) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {}
        for layer in layers:
            shapes[f"{layer.name}.A"] = (layer.rank, layer.inp)
            shapes[f"{layer.name}.B"] = (layer.out, layer.rank)
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
            draws = generator(seed, "basis", layer.name)
            if options["basis"] == "random":
                a = orthonormal(layer.inp, layer.rank, draws).T
                b = orthonormal(layer.out, layer.rank, draws)
            else:
                b, sigma, vh = truncated_svd(weight(layer.name), layer.rank, draws)
                a = sigma[:, None] * vh
            basis[f"{layer.name}.A"] = a.to("cpu", torch.float32).contiguous()
            basis[f"{layer.name}.B"] = b.to("cpu", torch.float32).contiguous()
        return basis

    def factor_shapes(self, layer: LayerSpec) -> dict[str, tuple[int, ...]]:
        return {"R": (layer.rank, layer.rank)}

    def attach(
        self,
        base: nn.Module,
        layer: LayerSpec,
        basis: Basis,
        *,
        seed: int,
        dropout: float,
        options: Mapping[str, Any],
    ) -> "LoraXsLayer":
        own = {name: basis[name] for name in (f"{layer.name}.A", f"{layer.name}.B")}
        draws = generator(seed, "init", layer.name, "R")
        r = INITIAL_STD * torch.randn(layer.rank, layer.rank, generator=draws, dtype=torch.float32)
        return LoraXsLayer(base, layer, self, own, r, dropout)

    def lowrank(
        self, layer: LayerSpec, factors: Mapping[str, Tensor], basis: Basis
    ) -> tuple[Tensor, Tensor]:
        r = factors["R"]
        a, b = directions(layer, basis)
        return layer.scale * b.to(r) @ r, a.to(r)

    def resize(self, factor: str, tensor: Tensor, old: LayerSpec, new: LayerSpec) -> Tensor:
        return resize_slots(resize_slots(tensor, 0, new.rank), 1, new.rank)


class LoraXsLayer(AdapterLayer):
    """y = base(x) + s B R A dropout(x)."""

    def __init__(
        self,
        base: nn.Module,
        layer: LayerSpec,
        method: Method,
        basis: Basis,
        r: Tensor,
        dropout: float,
    ) -> None:
        super().__init__(base, layer, method, basis, dropout)
        self.R = linear_leaf(r.to(self.weight.device, self.factor_dtype))  # (r, r)

    def factors(self) -> dict[str, nn.Parameter]:
        return {"R": leaf_weight(self.R)}

    def adapted(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        a, b = directions(self.layer, self.basis)
        h = F.linear(self.dropout(x).to(self.factor_dtype), a)  # (..., r)
        change: Tensor = self.layer.scale * F.linear(self.R(h), b)
        return y + change.to(y.dtype)


def directions(layer: LayerSpec, basis: Basis) -> tuple[Tensor, Tensor]:
    """The leading A (r, k) and B (d, r) of the layer's basis, which may be of a larger rank."""
    return basis[f"{layer.name}.A"][: layer.rank], basis[f"{layer.name}.B"][:, : layer.rank]


def orthonormal(size: int, rank: int, draws: torch.Generator) -> Tensor:
    """Random (size, rank) with orthonormal columns, float64."""
    q: Tensor = torch.linalg.qr(torch.randn(size, rank, generator=draws, dtype=torch.float64)).Q
    return q
