"""FedSVD: B is trained and averaged; then the product is divided anew, with orthonormal A.

Lee et al., "FedSVD: Adaptive Orthogonalization for Private Federated Learning with LoRA",
https://arxiv.org/abs/2505.12805, section 3.

The mean of B is exact as in FFA-LoRA. From the SVD B A = U S V^T, the next round's factors
are B = U S and A = V^T: the same product, a gradient of B of at most s ||G||, and noise in B
that reaches the weight change with energy s^2 sigma^2 d r. The rows of A still span what they
spanned before; the gain is conditioning, not reach.

Differs from the paper: the SVD is that of the small B R^T with A^T = Q R; while B is zero, A
stays as it is.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from fedlora.adapter import MethodTraits
from fedlora.errors import ConfigError
from fedlora.linalg import Pair
from fedlora.strategies.base import Stats, Strategy, StrategyState, bilinear


class FedSvd(Strategy):
    """Trains and averages only B, and re-factorises after the mean.

    Options:
        period: rounds between two re-factorisations.
        warmup: rounds before the first period.
    """

    name = "fedsvd"
    exact = True
    linear = True
    hetero_rank = False
    needs = "product"
    regauges = True
    privacy = frozenset({"record", "client"})
    options: ClassVar[Mapping[str, Any]] = {"period": 1, "warmup": 0}

    def __init__(self, traits: MethodTraits, options: Mapping[str, Any] | None = None) -> None:
        super().__init__(traits, options)
        for key, least in (("period", 1), ("warmup", 0)):
            if self.settings[key] < least:
                raise ConfigError(
                    f"federation.strategy_options.{key} = {self.settings[key]}; expected "
                    f"{least} or more"
                )

    def factors(self, state: StrategyState) -> tuple[str, ...]:
        return (bilinear(self.traits)[0],)

    def refactor(self, state: StrategyState, stats: Stats) -> StrategyState:
        means = stats.mean()
        tensors = {name: mean.float() for name, mean in means.items()}
        after = state.round + 1 - self.settings["warmup"]
        if after > 0 and after % self.settings["period"] == 0:
            zero, other = bilinear(self.traits)
            for layer in state.spec.layers:
                b_name, a_name = f"{layer.name}.{zero}", f"{layer.name}.{other}"
                mean = means[b_name]
                if bool(mean.any()):
                    b, a = orthonormalised(mean, state.tensors[a_name].double())
                    tensors[b_name], tensors[a_name] = b.float(), a.float()
        return self.advance(state, tensors)


def orthonormalised(b: Tensor, a: Tensor) -> Pair:
    """B and A of the same product and the same row space, with A A^T = I.

    B = U S and A = V^T of the SVD of the product, in descending order; where S is zero, rows
    of A complete the row space. The largest entry of every row of A is positive.

    Args:
        b: (d, r), float64.
        a: (r, k), float64, r <= k.
    """
    basis, triangle = torch.linalg.qr(a.T)  # (k, r), (r, r)
    # all r right vectors are needed, also where d < r
    u, sigma, vh = torch.linalg.svd(b @ triangle.T, full_matrices=b.shape[0] < b.shape[1])
    scaled = torch.zeros_like(b)
    scaled[:, : sigma.shape[0]] = u[:, : sigma.shape[0]] * sigma
    rows = vh @ basis.T  # (r, k)
    signs = rows.gather(1, rows.abs().argmax(1, keepdim=True)).sign()  # (r, 1)
    return scaled * signs.T, rows * signs
