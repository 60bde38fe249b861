"""What a simulation adds to an ideal network: absence, slowness, unequal and hostile clients.

Every choice is drawn from a stream named by round, attempt and client, so that it does not
depend on order or on resumes. The attacks are those of Blanchard et al.,
https://arxiv.org/abs/1703.02757 (arbitrary vectors) and Baruch et al.,
https://arxiv.org/abs/1902.06156 (small colluding shifts), plus what a broken client sends.
"""

import dataclasses
import math
from collections.abc import Sequence

import torch

from fedlora.adapter import AdapterState
from fedlora.config.job import ScenarioSection
from fedlora.data.example import Example
from fedlora.errors import ConfigError, near_miss
from fedlora.messages import ClientUpdate
from fedlora.seeds import generator
from fedlora.strategies.base import ClientInfo


class Scenario:
    """A job's scenario for given clients.

    Args:
        section: what the job says.
        clients: all clients' names, sorted.
        rank: rank of the whole adapter.
        seed: the run's seed.
        max_update_norm: scaling attacks stay below it.

    Raises:
        ConfigError: a hostile client that does not exist, or a rank above the adapter's.
    """

    def __init__(
        self,
        section: ScenarioSection,
        clients: Sequence[str],
        *,
        rank: int,
        seed: int,
        max_update_norm: float,
    ) -> None:
        self.section = section
        self.seed = seed
        self.max_update_norm = max_update_norm
        too_large = [r for r in section.ranks if r > rank]
        if too_large:
            raise ConfigError(
                f"scenario.ranks holds {too_large[0]}, more than adapter.rank = {rank}; "
                "adapter.rank is the largest rank of the federation"
            )
        ranks = section.ranks or [rank]
        self.clients = [ClientInfo(name, ranks[i % len(ranks)]) for i, name in enumerate(clients)]
        self._slow = set(self._part(clients, section.stragglers, "stragglers"))
        self._hostile: dict[str, list[int]] = {}
        for index, group in enumerate(section.hostile):
            for name in group.clients:
                if name not in clients:
                    raise ConfigError(
                        f"scenario.hostile names client {name!r}, which does not exist"
                        f"{near_miss(name, clients)}"
                    )
            chosen = group.clients or self._part(clients, group.fraction, f"hostile-{index}")
            for name in chosen:
                self._hostile.setdefault(name, []).append(index)

    def kinds(self, client: str) -> tuple[str, ...]:
        """The attacks of a client; empty for an honest one."""
        return tuple(self.section.hostile[i].kind for i in self._hostile.get(client, ()))

    def absent(self, client: str, number: int, attempt: int) -> bool:
        """The client does not answer in this attempt."""
        draw = torch.rand(1, generator=generator(self.seed, "absent", client, number, attempt))
        return float(draw) < self.section.dropout

    def virtual_seconds(self, client: str, steps: int) -> float:
        """When the client's reply comes, counted from the start of the round.

        Zero without stragglers: then time has no part in the scenario.
        """
        if not self.section.stragglers:
            return 0.0
        slower = self.section.slowdown if client in self._slow else 1.0
        return steps * self.section.step_s * slower

    def poison(self, client: str, examples: list[Example], num_labels: int) -> list[Example]:
        """The examples a client trains on; label flips turn class c into C - 1 - c."""
        if "label-flip" not in self.kinds(client):
            return examples
        return [dataclasses.replace(e, target=num_labels - 1 - e.target) for e in examples]

    def tamper(self, update: ClientUpdate) -> ClientUpdate:
        """What a hostile client sends instead of its honest update."""
        for index in self._hostile.get(update.client, ()):
            group = self.section.hostile[index]
            update = self._attack(update, group.kind, group.strength, index)
        return update

    def _attack(self, update: ClientUpdate, kind: str, strength: float, index: int) -> ClientUpdate:
        delta = update.delta
        first = min(delta.tensors)
        if kind == "nan":
            broken = delta.tensors[first].clone()
            broken.view(-1)[0] = float("nan")
            delta = AdapterState(delta.spec, {**delta.tensors, first: broken})
        elif kind == "huge-norm":
            delta = AdapterState(
                delta.spec, {k: torch.full_like(v, 1e30) for k, v in delta.tensors.items()}
            )
        elif kind == "wrong-shape":
            grown = torch.cat([delta.tensors[first], delta.tensors[first]])
            delta = AdapterState(delta.spec, {**delta.tensors, first: grown})
        elif kind == "replay":
            # says, truly or not, that it is of the round before: no memory, so no resume differs
            return dataclasses.replace(update, round=update.round - 1)
        elif kind == "sign-flip":
            delta = delta.scaled(-strength)
        elif kind == "scale":
            norm = _norm(delta)
            delta = delta.scaled(min(strength, 0.99 * self.max_update_norm / norm) if norm else 1.0)
        elif kind == "shift":
            direction = self._direction(delta, index)
            delta = delta + direction.scaled(strength * _norm(delta))
        return dataclasses.replace(update, delta=delta)

    def _direction(self, like: AdapterState, index: int) -> AdapterState:
        # drawn by tensor name alone, so that all clients of the group share it in all rounds
        draws = {
            name: torch.randn(t.shape, generator=generator(self.seed, "shift", index, name))
            for name, t in like.tensors.items()
        }
        direction = AdapterState(like.spec, draws)
        return direction.scaled(1.0 / _norm(direction))

    def _part(self, clients: Sequence[str], fraction: float, stream: str) -> list[str]:
        count = round(fraction * len(clients))
        order = torch.randperm(len(clients), generator=generator(self.seed, stream)).tolist()
        return sorted(clients[i] for i in order[:count])


def _norm(state: AdapterState) -> float:
    return math.sqrt(sum(float((t.double() ** 2).sum()) for t in state.tensors.values()))
