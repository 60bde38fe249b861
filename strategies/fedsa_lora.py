"""FedSA-LoRA: A is shared and averaged, B (and the heads) stay with each client.

Guo et al., "Selective Aggregation for Low-Rank Adaptation in Federated Learning",
https://arxiv.org/abs/2410.01463, section 3: A learns what clients have in common, B what is
their own. A client without a B of its own starts from the server's, which is zero.

There is no global model: every client has its own, made of the mean A and its own B.
"""

from dataclasses import replace

from fedlora.messages import HEADS, RoundPlan
from fedlora.strategies.base import ClientInfo, Strategy, StrategyState, bilinear


class FedSALora(Strategy):
    """Trains both factors; averages the one that starts at random."""

    name = "fedsa-lora"
    exact = False
    linear = True
    hetero_rank = False
    needs = "bilinear"
    personal = True
    privacy = frozenset({"record", "client"})

    def factors(self, state: StrategyState) -> tuple[str, ...]:
        return tuple(sorted(bilinear(self.traits)))

    def plan(self, state: StrategyState, client: ClientInfo, plan: RoundPlan) -> RoundPlan:
        zero, _ = bilinear(self.traits)
        return replace(super().plan(state, client, plan), kept=(zero, HEADS))
