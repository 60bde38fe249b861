"""Laws of purity: functions of their arguments alone, so that a run can be stopped and resumed."""

import copy
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedlora.messages import ClientUpdate
from fedlora.strategies.base import Strategy, StrategyState
from fedlora.strategies.conformance.dense_guard import DenseTensorError, forbid_dense
from fedlora.strategies.conformance.federation import Federation
from fedlora.strategies.conformance.law import Law, LawBroken, require
from fedlora.wire import decode_own, encode_json, encode_tensors

# rank 8 of 512: four clients together stack to rank 32
WIDE = 512
WIDE_RANK = 8


def untouched(federation: Federation) -> None:
    strategy = federation.strategy()
    for state in federation.walk():
        updates = federation.cohort(strategy, state)
        watched = Watch(state, updates)
        for client in federation.clients:
            plan = federation.plan(strategy, state, client)
            strategy.broadcast_key(state, client)
            strategy.broadcast(state, client)
            strategy.expect(state, plan)
        watched.check("plan, broadcast or expect")
        stats = strategy.reduce(state, updates)
        watched.check("reduce")
        sums = {f"sum {name}": tensor for name, tensor in stats.sums.items()}
        watched.add(sums)
        new = strategy.refactor(state, stats)
        watched.check("refactor")
        strategy.global_delta(state)
        watched.check("global_delta")
        fresh = {f"next {name}": tensor for name, tensor in new.tensors.items()}
        watched.add(fresh)
        strategy.global_delta(new)
        watched.check("global_delta")


def repeated(federation: Federation) -> None:
    """Once more after other rounds, and by a second instance."""
    used = federation.strategy()
    states = [used.init(federation.adapter)]
    kept = []
    for _ in range(3):
        updates = federation.cohort(used, states[-1])
        kept.append(updates)
        states.append(federation.round(used, states[-1], updates))
    for number, updates in enumerate(kept):
        for who, strategy in (("the same instance", used), ("a new one", federation.strategy())):
            again = federation.round(strategy, states[number], updates)
            _same_state(again, states[number + 1], f"round {number + 1}, run again by {who},")
            _same_starts(federation, strategy, federation.strategy(), states[number])


def undrawn(federation: Federation) -> None:
    with _generators_kept():
        results: list[StrategyState] = []
        for seed in (1, 2):
            _seed_all(seed)
            before = _generator_states()
            strategy = federation.strategy()
            state = strategy.init(federation.adapter)
            for _ in range(2):
                state = federation.round(strategy, state, federation.cohort(strategy, state))
                strategy.global_delta(state)
            require(
                _generator_states() == before,
                "a number was drawn from a global generator (torch, numpy or random)",
                'draws from fedlora.seeds.generator(state.spec.seed, "name", state.round)',
            )
            results.append(state)
        _same_state(results[1], results[0], "with another global seed the next state")


def resumed(federation: Federation) -> None:
    strategy = federation.strategy()
    state = whole = list(federation.walk())[1]
    for _ in range(3):
        whole = federation.round(strategy, whole, federation.cohort(strategy, whole))
        again = federation.strategy()
        initial = again.init(federation.adapter)
        state = StrategyState(
            initial.spec,
            state.round,
            decode_own(encode_tensors(state.tensors)),
            json.loads(encode_json(dict(state.extra))),
        )
        state = federation.round(again, state, federation.cohort(again, state))
        _same_state(state, whole, "the state after stopping and resuming")


def narrow(federation: Federation) -> None:
    wide = Federation(
        lambda traits: federation.unchecked(),
        federation.methods,
        federation.method.name,
        (WIDE_RANK,) * 4,
        layers={"wide.a": (WIDE, WIDE), "wide.b": (WIDE, WIDE)},
        head_shapes={},
        rank=WIDE_RANK,
        drawn_basis=False,
    )
    strategy = wide.strategy()
    state = strategy.init(wide.adapter)
    for _ in range(2):
        updates = wide.cohort(strategy, state)
        try:
            with forbid_dense(WIDE * WIDE):
                for client in wide.clients:
                    strategy.broadcast(state, client)
                stats = strategy.reduce(state, updates)
                for name in stats.stacks:
                    stats.stacks[name]
                state = strategy.refactor(state, stats)
                strategy.global_delta(state)
        except DenseTensorError as e:
            raise LawBroken(
                f"with layers {WIDE} x {WIDE} and rank {WIDE_RANK}, {e}",
                f"fewer than {WIDE * WIDE} numbers in every tensor",
            ) from e


class Watch:
    """What must stay as it is: tensors by torch's count of changes in place, and by value."""

    def __init__(self, state: StrategyState, updates: Sequence[ClientUpdate]) -> None:
        self._seen: dict[str, tuple[Tensor, int, Tensor]] = {}
        self._maps: list[tuple[str, Mapping[str, Any], Any]] = []
        self._map("the state's extra", state.extra)
        self._map("the state's tensors", state.tensors)
        self.add({f"state {name}": t for name, t in state.tensors.items()})
        for update in updates:
            for kind, tensors in (
                ("delta", update.delta.tensors),
                ("start", update.begin.tensors),
                ("control", update.control),
            ):
                self._map(f"the {kind} of {update.client}", tensors)
                self.add({f"{kind} {name} of {update.client}": t for name, t in tensors.items()})

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Watches further tensors."""
        for name, tensor in tensors.items():
            self._seen[name] = (tensor, tensor._version, tensor.clone())

    def check(self, step: str) -> None:
        """Raises `LawBroken` when something has changed since it was added."""
        for name, (tensor, version, copied) in self._seen.items():
            same = tensor._version == version and torch.equal(tensor, copied)
            require(same, f"{step} changed {name} in place", "a new tensor (a + b, not a.add_(b))")
        for name, mapping, before in self._maps:
            require(_plain(mapping) == before, f"{step} changed {name}", "a new dict")

    def _map(self, name: str, mapping: Mapping[str, Any]) -> None:
        self._maps.append((name, mapping, _plain(mapping)))


def _plain(mapping: Mapping[str, Any]) -> Any:
    """Tensors by identity, all else by value."""
    return {k: id(v) if isinstance(v, Tensor) else copy.deepcopy(v) for k, v in mapping.items()}


def _same_state(found: StrategyState, expected: StrategyState, what: str) -> None:
    for name in sorted(found.tensors.keys() | expected.tensors.keys()):
        left, right = found.tensors.get(name), expected.tensors.get(name)
        same = left is not None and right is not None and torch.equal(left, right)
        require(same, f"{what} has another {name}", "the same bits")
    same = encode_json(dict(found.extra)) == encode_json(dict(expected.extra))
    require(same, f"{what} has another extra", "the same JSON")


def _same_starts(
    federation: Federation, left: Strategy, right: Strategy, state: StrategyState
) -> None:
    for client in federation.clients:
        found, expected = left.broadcast(state, client), right.broadcast(state, client)
        for name, tensor in expected.adapter.tensors.items():
            same = torch.equal(found.adapter.tensors[name], tensor)
            what = f"round {state.round + 1}'s start, made again,"
            require(same, f"{what} has another {name}", "the same bits")


def _seed_all(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


def _generator_states() -> list[str]:
    kind, keys, *rest = np.random.get_state()
    return [
        torch.get_rng_state().numpy().tobytes().hex(),
        repr(random.getstate()),
        repr((kind, np.asarray(keys).tobytes(), rest)),
    ]


@contextmanager
def _generators_kept() -> Iterator[None]:
    torch_state, plain_state = torch.get_rng_state(), random.getstate()
    numpy_state = np.random.get_state()
    try:
        yield
    finally:
        torch.set_rng_state(torch_state)
        random.setstate(plain_state)
        np.random.set_state(numpy_state)


def _equal_ranks(federation: Federation, strategy: Strategy) -> bool:
    return len(set(federation.ranks)) == 1


PURITY: tuple[Law, ...] = (
    Law(
        "inputs",
        "No function changes the state, the updates or the sums that it is given.",
        "an operation in place (add_, mul_, +=, copy_) on a tensor of the caller",
        "the function that is named, for operations that end in an underscore, and +=",
        untouched,
    ),
    Law(
        "deterministic",
        "The same state and updates give the same bits, whatever was called before.",
        "something is kept on self between calls; it belongs in the state (self.advance)",
        "assignments to self outside __init__",
        repeated,
    ),
    Law(
        "random",
        "Random numbers come from named seeds, never from a global generator.",
        "torch.randn, numpy.random or random without a generator of its own",
        "every random function; pass generator=fedlora.seeds.generator(...)",
        undrawn,
    ),
    Law(
        "resume",
        "A run that is stopped and resumed goes on with the same bits.",
        "something that decides the next round is neither in tensors nor in extra",
        "what refactor returns",
        resumed,
    ),
    Law(
        "low-rank",
        "No d x k matrix is formed, so that memory follows the rank and not the model.",
        "B @ A was multiplied out; keep the pair (see fedlora.linalg: stack, truncate, project)",
        "products of two factors in reduce, refactor, broadcast or global_delta",
        narrow,
        _equal_ranks,
    ),
)
