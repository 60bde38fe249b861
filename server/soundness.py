"""What a strategy hands over, before it is believed: types, names, shapes, finite numbers."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fedlora.adapter import AdapterState, Tensors, trained_shapes, with_rank
from fedlora.adapters import METHODS
from fedlora.errors import StrategyError
from fedlora.messages import CONTROL, RoundPlan, Start
from fedlora.server.guard import expect_type, strategy_errors
from fedlora.strategies.base import Stats, Strategy, StrategyState
from fedlora.wire import NAME, encode_json


def checked_start(state: StrategyState, start: Start) -> Start:
    """What `broadcast` returned.

    Raises:
        StrategyError: another type, or a tensor that no client could take.
    """
    expect_type(start, Start, "what broadcast returned")
    expect_type(start.adapter, AdapterState, "the adapter of broadcast")
    spec = start.adapter.spec
    if spec != with_rank(state.spec, spec.rank):
        raise StrategyError(
            "the adapter of broadcast has another spec than the global one at its rank "
            f"{spec.rank}; clients would refuse it"
        )
    _whole(start.adapter.tensors, trained_shapes(spec, METHODS[spec.method]), "broadcast")
    for version, fold in start.fold.items():
        for layer in spec.layers:
            for name in (f"{layer.name}.L", f"{layer.name}.Q"):
                if name not in fold:
                    raise StrategyError(f"fold {version} lacks {name} after broadcast")
    for tensors in (*start.fold.values(), start.control):
        for name, tensor in tensors.items():
            _sound(name, tensor, "broadcast")
    return start


def checked_shapes(
    shapes: Mapping[str, Sequence[int]], plan: RoundPlan, start: Start
) -> dict[str, tuple[int, ...]]:
    """What `expect` returned: shapes of the start's tensors, for deltas are added to them.

    Raises:
        StrategyError: another type, or a tensor that the start does not have.
    """
    expect_type(shapes, Mapping, f"what expect returned for client {plan.client}")
    if plan.rank != start.adapter.spec.rank:
        raise StrategyError(
            f"the plan gives client {plan.client} rank {plan.rank}, but broadcast rank "
            f"{start.adapter.spec.rank}"
        )
    held = start.adapter.tensors
    for name, shape in shapes.items():
        of = name.removeprefix(CONTROL) if plan.control else name
        if of not in held:
            raise StrategyError(f"expect names tensor {name}, which broadcast does not have")
        if tuple(shape) != tuple(held[of].shape):
            raise StrategyError(
                f"expect gives tensor {name} shape {tuple(shape)}; broadcast has "
                f"{tuple(held[of].shape)}"
            )
    return {name: tuple(shape) for name, shape in shapes.items()}


def checked_notes(stats: Stats) -> dict[str, Any]:
    """The notes of what `reduce` returned.

    Raises:
        StrategyError: another type, or notes that are not JSON.
    """
    if not isinstance(stats, Stats):
        raise StrategyError(f"reduce returned a {type(stats).__name__}; expected Stats")
    return _json(stats.notes, "the notes of reduce")


def checked_state(state: StrategyState, new: StrategyState) -> StrategyState:
    """What `refactor` returned.

    Raises:
        StrategyError: another type, round or spec, or a tensor that cannot be committed.
    """
    if not isinstance(new, StrategyState):
        raise StrategyError(f"refactor returned a {type(new).__name__}; expected StrategyState")
    if new.round != state.round + 1:
        raise StrategyError(f"refactor returned round {new.round}; expected {state.round + 1}")
    if new.spec != state.spec:
        raise StrategyError("refactor returned another spec; expected that of the state")
    _json(new.extra, "extra after refactor")
    for name, tensor in new.tensors.items():
        if not NAME.fullmatch(name):
            raise StrategyError(
                f"tensor name {name[:80]!r} after refactor; expected 1 to 256 of A-Z a-z 0-9 . _ -"
            )
        _sound(name, tensor, "refactor")
    for name in trained_shapes(state.spec, METHODS[state.spec.method]):
        if name in state.tensors and name not in new.tensors:
            raise StrategyError(f"the state lacks {name} after refactor")
    return new


def checked_adapter(adapter: AdapterState) -> AdapterState:
    """What `global_delta` returned.

    Raises:
        StrategyError: another type, or a tensor of another shape, dtype or value.
    """
    expect_type(adapter, AdapterState, "what global_delta returned")
    _whole(
        adapter.tensors, trained_shapes(adapter.spec, METHODS[adapter.spec.method]), "global_delta"
    )
    return adapter


def global_adapter(strategy: Strategy, state: StrategyState) -> AdapterState:
    """The global adapter of a committed state.

    Raises:
        StrategyError: the strategy failed, or made something unusable.
    """
    with strategy_errors(strategy, state, "global_delta"):
        return checked_adapter(strategy.global_delta(state))


def _whole(tensors: Tensors, shapes: Mapping[str, tuple[int, ...]], step: str) -> None:
    for name, shape in shapes.items():
        if name not in tensors:
            raise StrategyError(f"the adapter lacks {name} after {step}")
        _sound(name, tensors[name], step)
        if tuple(tensors[name].shape) != shape:
            raise StrategyError(
                f"tensor {name} has shape {tuple(tensors[name].shape)} after {step}; expected "
                f"{shape}"
            )
    if strange := sorted(tensors.keys() - shapes.keys()):
        raise StrategyError(f"the adapter has a tensor {strange[0]!r} after {step}; expected none")


def _sound(name: str, tensor: Any, step: str) -> None:
    if not isinstance(tensor, Tensor):
        raise StrategyError(f"{name} is a {type(tensor).__name__} after {step}, no tensor")
    if tensor.dtype != torch.float32:
        raise StrategyError(
            f"tensor {name} has dtype {tensor.dtype} after {step}; expected torch.float32"
        )
    if not bool(torch.isfinite(tensor).all()):
        raise StrategyError(f"tensor {name} is not finite after {step}")


def _json(value: Mapping[str, Any], place: str) -> dict[str, Any]:
    try:
        plain = dict(value)
        read_back = json.loads(encode_json(plain))
    except (TypeError, ValueError) as e:
        raise StrategyError(f"{place} cannot be written as JSON: {e}") from e
    # a resumed run reads it back, and must find what this one goes on with
    if read_back != plain:
        raise StrategyError(
            f"{place} is another one once read back from JSON; use lists for tuples, and texts "
            "for keys"
        )
    return plain
