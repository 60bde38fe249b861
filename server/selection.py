"""Who is asked in a round."""

from collections.abc import Sequence

import torch

from fedlora.seeds import generator
from fedlora.strategies.base import ClientInfo


def choose(
    roster: Sequence[ClientInfo], wanted: int | None, seed: int, number: int, attempt: int
) -> list[ClientInfo]:
    """So many of the clients that are there, drawn without replacement; None takes all."""
    if wanted is None or wanted >= len(roster):
        return list(roster)
    stream = generator(seed, "clients", number, attempt)
    picks = torch.randperm(len(roster), generator=stream)[:wanted].tolist()
    return [roster[i] for i in sorted(picks)]
