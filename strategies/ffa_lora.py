"""FFA-LoRA: the random factor stays frozen, so that averaging the other one is exact.

Sun et al., "Improving LoRA in Privacy-preserving Federated Learning",
https://arxiv.org/abs/2403.12313, section 4.

Differs from the paper: clients may hold only the leading slots of the factors. Their
missing slots count as zero, so that the result is the exact mean of the clients' changes.
"""

from fedlora.strategies.base import Strategy, StrategyState, bilinear


class FfaLora(Strategy):
    """Trains and averages only the factor that starts at zero."""

    name = "ffa-lora"
    exact = True
    linear = True
    hetero_rank = True
    needs = "bilinear"
    asynchronous = True
    privacy = frozenset({"record", "client"})

    def factors(self, state: StrategyState) -> tuple[str, ...]:
        return (bilinear(self.traits)[0],)
