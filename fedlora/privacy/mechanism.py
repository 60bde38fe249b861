"""The Gaussian mechanism of one client's training, and the noisy gradient it releases."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedlora.privacy.noise import NoiseSource
from fedlora.privacy.pieces import Piece, clipped_sum
from fedlora.privacy.sampling import Uniform, poisson_sample


@dataclass(frozen=True)
class Mechanism:
    """DP-SGD of n examples; Abadi et al., https://arxiv.org/abs/1607.00133, algorithm 1.

    Every step releases (sum of clipped gradients + N(0, (sigma C)^2 I)) / (q n).

    Attributes:
        examples: n.
        rate: q, the probability of an example to be in a step's batch.
        clip: C, the largest L2 norm of an example's gradient over all trained parameters.
        noise_multiplier: sigma.
        source: of the noise.
        uniform: draws the uniform numbers that batches are taken by.
        per_sample: see `privacy.per_sample`.
    """

    examples: int
    rate: float
    clip: float
    noise_multiplier: float
    source: NoiseSource
    uniform: Uniform
    per_sample: str = "auto"

    def batch(self) -> list[int]:
        """The examples of one step; may be none."""
        return poisson_sample(self.examples, self.rate, self.uniform)

    def clipped(self, pieces: Mapping[str, Piece]) -> dict[str, Tensor]:
        """The sum of the examples' clipped gradients, by parameter."""
        return clipped_sum(pieces, self.clip)[0]

    def released(
        self, sums: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter]
    ) -> dict[str, Tensor]:
        """The noisy gradient of one step; the only thing that may leave it.

        Args:
            sums: over the step's batch; parameters that are missing count as zero, all of them
                for an empty batch.
            parameters: everything that is trained.
        """
        of_one = {name: value[None] for name, value in sums.items()}
        return {name: value[0] for name, value in released([self], of_one, parameters).items()}


def released(
    mechanisms: Sequence[Mechanism],
    sums: Mapping[str, Tensor],
    parameters: Mapping[str, nn.Parameter],
) -> dict[str, Tensor]:
    """`Mechanism.released` of K clients with parameters alike, (K, *shape) each.

    Every client's source is asked for the same as if it were alone, in the same order.
    """
    like = next(iter(parameters.values()))

    def column(values: Iterable[float]) -> Tensor:
        return torch.tensor(list(values), dtype=torch.float64, device=like.device)

    spread = column(m.noise_multiplier * m.clip for m in mechanisms)
    # never the size of the batch that was drawn: it is private, and would change the scale
    expected = column(m.rate * m.examples for m in mechanisms)
    found = {}
    for name in sorted(parameters):
        parameter = parameters[name]
        by_client = (-1, *[1] * parameter.dim())
        noise = torch.stack([m.source.normal(parameter.shape) for m in mechanisms])
        total = spread.view(by_client) * noise.to(parameter.device)
        if name in sums:
            total = total + sums[name].to(torch.float64)
        found[name] = (total / expected.view(by_client)).to(parameter.dtype)
    return found
