"""FedIT: the factors are averaged one by one (FedAvg of A and B).

Zhang et al., "Towards Building the Federated GPT: Federated Instruction Tuning",
https://arxiv.org/abs/2305.05644, section 3; averaging as in McMahan et al.,
"Communication-Efficient Learning of Deep Networks from Decentralized Data",
https://arxiv.org/abs/1602.05629, algorithm 1.

For a bilinear adapter the product of means is not the mean of products; the difference is
s * sum_i p_i (B_i - B)(A_i - A), reported every round as the aggregation error.
"""

from fedlora.strategies.base import Strategy, StrategyState


class FedIT(Strategy):
    """Weighted mean of every factor."""

    name = "fedit"
    exact = False
    linear = True
    hetero_rank = False
    asynchronous = True
    privacy = frozenset({"record", "client"})

    def factors(self, state: StrategyState) -> tuple[str, ...]:
        return tuple(sorted(self.traits.factor_shapes(state.spec.layers[0])))
