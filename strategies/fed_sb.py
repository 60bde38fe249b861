"""Fed-SB: the small square matrix of LoRA-XS is averaged, which is exact and costs r^2.

Singhal et al., "Fed-SB: A Silver Bullet for Extreme Communication Efficiency and Performance
in (Private) Federated LoRA Fine-Tuning", https://arxiv.org/abs/2502.15436, section 3: with B
and A frozen, s B (sum p_i R_i) A = sum p_i s B R_i A.

Differs from the paper: B and A are singular directions of the base weight (method lora-xs),
where the paper takes those of a first gradient on pooled data, which a federation with
private data has not got. And clients may hold a leading block of R; the rest of theirs counts
as zero, so that the result is the exact mean of the clients' changes.
"""

from fedlora.adapter import MethodTraits
from fedlora.strategies.base import Strategy, StrategyState

FACTOR = "R"


class FedSB(Strategy):
    """Weighted mean of R (r, r), between two frozen matrices that all clients share."""

    name = "fed-sb"
    exact = True
    linear = True
    hetero_rank = True
    asynchronous = True
    privacy = frozenset({"record", "client"})

    @classmethod
    def misfit(cls, traits: MethodTraits) -> str:
        if traits.name == "lora-xs":
            return ""
        other = "ffa-lora" if traits.bilinear_factors else "fedit"
        return (
            f"averages the matrix R of method lora-xs, which method {traits.name!r} has not "
            f"got; choose method lora-xs, or strategy {other}"
        )

    def factors(self, state: StrategyState) -> tuple[str, ...]:
        return (FACTOR,)
