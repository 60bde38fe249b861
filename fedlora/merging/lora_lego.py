"""LoRA-LEGO: rank-one units of all adapters, clustered; see `strategies.rank_clustering`.

Zhao et al., "Merging LoRAs like Playing LEGO: Pushing the Modularity of LoRA to Extremes
Through Rank-Wise Clustering", https://arxiv.org/abs/2409.16167.
"""

from dataclasses import dataclass
from typing import Literal, cast

from fedlora.errors import ConfigError
from fedlora.linalg import Pair
from fedlora.merging.base import Given, Merger, check_range
from fedlora.seeds import generator
from fedlora.strategies.rank_clustering import merge_units


@dataclass(frozen=True)
class LoraLego(Merger):
    """As many clusters as the rank; by default the largest rank of an adapter.

    Attributes:
        mode: "mass" keeps the scale of the weighted mean; "paper" is the paper's, which
            leaves the weights out.
        sign_align: count (-a, -b) as the same unit as (a, b).
        param_reweight: give centroids the mean length of their members.
        output_reweight: in mode "paper", multiply by sqrt(mean rank / clusters).
        n_init: starts of k-means.
        max_iter: most iterations of each start.
    """

    mode: str = "mass"
    sign_align: bool = True
    param_reweight: bool = True
    output_reweight: bool = True
    n_init: int = 10
    max_iter: int = 100

    def __post_init__(self) -> None:
        if self.mode not in ("mass", "paper"):
            raise ConfigError(f'option mode = "{self.mode}" is not known; known: mass, paper')
        for option in ("n_init", "max_iter"):
            check_range(option, getattr(self, option), getattr(self, option) >= 1, "from 1 up")

    def merge(self, given: Given) -> dict[str, Pair]:
        merged = {}
        for name, changes in given.layers.items():
            ranks = [right.shape[0] for _, right in changes]
            merged[name] = merge_units(
                changes,
                given.weights,
                min(given.rank or max(ranks), sum(ranks)),
                mode=cast(Literal["mass", "paper"], self.mode),
                sign_align=self.sign_align,
                param_reweight=self.param_reweight,
                output_reweight=self.output_reweight,
                n_init=self.n_init,
                max_iter=self.max_iter,
                generator=generator(given.seed, "lora-lego", name),
            )
        return merged
