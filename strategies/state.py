"""What strategies are given and give back: conditions, state, and what is left of updates."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from fedlora.adapter import AdapterSpec, LayerSpec
from fedlora.linalg import stack
from fedlora.messages import UNCOMPRESSED, ClientUpdate, Compression, LazyTensors, Pair

Updates = Sequence[ClientUpdate]
PrivacyUnit = Literal["record", "client"]


@dataclass(frozen=True)
class ClientInfo:
    """What a strategy knows of a client: its name and the rank it can hold."""

    name: str
    rank: int


@dataclass(frozen=True)
class Conditions:
    """What a strategy is checked against before round 1.

    Attributes:
        spec: the global adapter.
        ranks: rank of every client.
        clients_per_round: clients that are asked in a round; None for all.
        optimizer: the clients' optimiser.
        optimizer_state: whether clients keep its moments between rounds.
        momentum: momentum of sgd.
        privacy: unit of differential privacy; None without.
        asynchronous: updates may be of earlier versions.
        compression: how tensors travel.
        secure: nothing is known of updates but their weighted mean.
    """

    spec: AdapterSpec
    ranks: Sequence[int]
    clients_per_round: int | None = None
    optimizer: str = "adamw"
    optimizer_state: str = "reset"
    momentum: float = 0.0
    privacy: PrivacyUnit | None = None
    asynchronous: bool = False
    compression: Compression = UNCOMPRESSED
    secure: bool = False


@dataclass(frozen=True)
class StrategyState:
    """Everything a strategy carries from round to round; a checkpoint is all of it.

    Attributes:
        spec: the global adapter's spec.
        round: rounds completed.
        tensors: global factors and heads (and whatever else the strategy keeps), float32.
        extra: small JSON values.
    """

    spec: AdapterSpec
    round: int
    tensors: Mapping[str, Tensor]
    extra: Mapping[str, Any] = field(default_factory=dict)


class Stacks(Mapping[str, Pair]):
    """Layer -> (L (d, R), Q (R, k)) with L Q = sum_i p_i dW_i, made anew at each access.

    Args:
        layers: the global layers.
        read: global layer -> the pairs of all clients.
        weights: p_i, in the same order.
    """

    def __init__(
        self,
        layers: Sequence[LayerSpec],
        read: Callable[[LayerSpec], Sequence[Pair]],
        weights: Sequence[float],
    ) -> None:
        self._layers = {layer.name: layer for layer in layers}
        self._read = read
        self._weights = weights

    def __getitem__(self, name: str) -> Pair:
        return stack(self._read(self._layers[name]), self._weights)

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)


@dataclass(frozen=True)
class Stats:
    """What `reduce` leaves of the updates.

    Attributes:
        sums: weighted sums of tensors, float64.
        weight: sum of the weights.
        stacks: layer -> the mean weight change as a low-rank pair; {} if not needed.
        notes: small JSON values for the record of the round, e.g. who was screened out.
    """

    sums: Mapping[str, Tensor]
    weight: float
    stacks: Mapping[str, Pair] = field(default_factory=dict)
    notes: Mapping[str, Any] = field(default_factory=dict)

    def mean(self) -> LazyTensors:
        """Sums / weight, float64, one at a time."""
        return LazyTensors(self.sums, lambda name: self.sums[name] / self.weight)
