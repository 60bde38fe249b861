"""How far clients' updates lie apart, as weight changes or as factors.

Blanchard et al., "Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent",
https://arxiv.org/abs/1703.02757, section 4, compare updates by squared L2 distance. Of a
low-rank update it can be taken in two spaces:

- "product": of the weight changes s B_i A_i - s B_g A_g, layer by layer, from the factors'
  Gram matrices; it does not depend on how a client divides its change between B and A;
- "factor": of the sent tensors as they are.

Heads are compared as they are in both.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Literal, cast

import torch
from torch import Tensor

from fedlora.adapter import AdapterState, MethodTraits, split_name
from fedlora.errors import ConfigError, StrategyError
from fedlora.linalg import difference, gram_kernel, product_norm
from fedlora.messages import ClientUpdate, LazyTensors, Pair
from fedlora.strategies.base import Strategy, StrategyState, Updates, bilinear
from fedlora.strategies.wrappers.base import Wrapper

Space = Literal["factor", "product"]

# a squared distance below this part of the squared norms is rounding of the kernel
_NOISE = 1e-13


class Spaced(Wrapper):
    """A wrapper with the option `space`: "product" or "factor".

    Raises:
        ConfigError: another value.
    """

    hetero_rank = True
    space: Space

    def __init__(self, inner: Strategy, options: Mapping[str, object] | None = None) -> None:
        super().__init__(inner, options)
        self.space = checked_space(self.name, self.settings["space"])
        if self.space == "factor":
            self.hetero_rank = False

    def check_space(self) -> None:
        """Refuses "product" where the change is not s B A, or not known to the server.

        Raises:
            ConfigError: with the reason and what to choose instead.
        """
        if self.space == "factor":
            return
        place = f'federation.wrappers.{self.name}.space = "product"'
        if not self.traits.product:
            raise ConfigError(
                f"{place} needs a weight change that is s B A and nothing else, which method "
                f'{self.traits.name!r} is not; choose space = "factor", or method lora or rslora'
            )
        if self.personal:
            core = list(self.inside())[-1]
            raise ConfigError(
                f"{place} needs both factors of every client, but with strategy {core.name!r} a "
                'part of the adapter stays at the client; choose space = "factor"'
            )


def checked_space(name: str, space: str) -> Space:
    """`space` if there is such a space.

    Raises:
        ConfigError: there is not.
    """
    if space not in ("factor", "product"):
        raise ConfigError(
            f'federation.wrappers.{name}.space = "{space}" is not known; choose "factor" or '
            '"product"'
        )
    return cast(Space, space)


def start_product(traits: MethodTraits, update: ClientUpdate, layer: str) -> Pair:
    """(s B_g (d, r), A_g (r, k)), float64: what the client started from, at its own rank."""
    b, a = bilinear(traits)
    start, scale = update.begin.tensors, update.begin.spec.layer(layer).scale
    return scale * start[f"{layer}.{b}"].double(), start[f"{layer}.{a}"].double()


def change(traits: MethodTraits, update: ClientUpdate, layer: str) -> Pair:
    """The change s (B_i A_i - B_g A_g) of one layer, as a pair of rank at most 2 r, float64.

    Written as s (B_i - B_g) A_i + s B_g (A_i - A_g), so that a small step away from large
    factors keeps its digits.
    """
    own = update.delta.spec.layer(layer)
    start = start_product(traits, update, layer)
    if update.products is not None:
        return difference(update.products(own), start)
    b, a = (f"{layer}.{factor}" for factor in bilinear(traits))
    delta = update.delta.tensors
    lefts, rights = [], []
    if b in delta:
        lefts.append(own.scale * delta[b].double())
        rights.append(update.ended[a])
    if a in delta:
        lefts.append(start[0])
        rights.append(delta[a].double())
    if not lefts:
        return start[0][:, :0], start[1][:0]
    return torch.cat(lefts, 1), torch.cat(rights, 0)  # (d, 2 r), (2 r, k)


def update_norm(traits: MethodTraits, update: ClientUpdate, space: Space) -> float:
    """L2 norm of a client's update over all layers, heads and control variates."""
    delta = update.delta.tensors
    layers = [layer.name for layer in update.delta.spec.layers]
    squares = 0.0
    for name in _apart(update, space, set(layers)):
        squares += float((delta[name].double() ** 2).sum())
    for name in update.control:
        squares += float((update.control[name].double() ** 2).sum())
    if space == "product":
        for layer in layers:
            squares += product_norm(*change(traits, update, layer)) ** 2
    return float(squares**0.5)


def squared_distances(
    traits: MethodTraits, state: StrategyState, updates: Updates, space: Space
) -> Tensor:
    """D (n, n), float64: squared distances between updates, zero on the diagonal.

    From the kernel K of inner products, D_ij = K_ii + K_jj - 2 K_ij, summed over layers; what
    is rounding of K counts as zero, so that equal updates have distance zero.

    Raises:
        StrategyError: clients sent different tensors.
    """
    names = set(updates[0].delta.tensors)
    for update in updates:
        if odd := names ^ set(update.delta.tensors):
            raise StrategyError(
                f"clients {updates[0].client!r} and {update.client!r} sent different tensors "
                f"({min(odd)} in only one); updates can be compared only when all send the same"
            )
    layers = [layer.name for layer in state.spec.layers]
    n = len(updates)
    kernel = torch.zeros(n, n, dtype=torch.float64)
    for name in _apart(updates[0], space, set(layers)):
        rows = torch.stack([u.delta.tensors[name].double().flatten() for u in updates])
        kernel += rows @ rows.T  # (n, n)
    if space == "product":
        for layer in layers:
            kernel += gram_kernel([change(traits, update, layer) for update in updates])
    return distances_of(kernel)


def distances_of(kernel: Tensor) -> Tensor:
    """D (n, n) with D_ij = K_ii + K_jj - 2 K_ij of a kernel K (n, n), rounding taken as zero."""
    squares = kernel.diagonal()
    sums = squares[:, None] + squares[None, :]
    found = sums - (kernel + kernel.T)
    found = found.where(found > _NOISE * sums, 0.0)
    return found.fill_diagonal_(0.0)


def with_delta(update: ClientUpdate, read: Callable[[str], Tensor]) -> ClientUpdate:
    """`update` whose delta is made by `read`, one tensor at a time."""
    lazy = LazyTensors(update.delta.tensors, read)
    return replace(update, delta=AdapterState(update.delta.spec, lazy))


def _apart(update: ClientUpdate, space: Space, layers: set[str]) -> list[str]:
    """Names of the sent tensors that are compared as they are."""
    names = sorted(update.delta.tensors)
    return [n for n in names if space == "factor" or split_name(n)[0] not in layers]
