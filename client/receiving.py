"""From the parts of a broadcast to what a client starts from."""

from collections.abc import Callable, Mapping
from dataclasses import replace

from torch import Tensor

from fedlora.adapter import AdapterSpec, AdapterState, Tensors, tensors_digest, trained_shapes
from fedlora.adapters.base import Method
from fedlora.errors import AdapterError
from fedlora.messages import HEADS, Broadcast, Coding, Start, part_coding
from fedlora.strategies.base import cut
from fedlora.strategies.plan_check import plan_problem
from fedlora.wire import Shapes, decode_coded, decode_part, encode_coded, sha256

Fetch = Callable[[str], bytes]

FACTOR = "factor."
FOLD = "fold."


def receive(
    broadcast: Broadcast,
    full: AdapterSpec,
    spec: AdapterSpec,
    method: Method,
    kept: Tensors,
    fetch: Fetch,
) -> Start:
    """What the broadcast says to start from.

    A part that the client keeps itself, or can draw itself from the plan's seed, is not
    fetched.

    Args:
        full: the federation's spec at full rank.
        spec: the same at this client's rank.
        kept: the tensors that the client has kept from an earlier round.
        fetch: digest -> bytes of a part.

    Raises:
        AdapterError: another spec or basis than the server's, or a part that does not fit.
    """
    if why := plan_problem(broadcast.plan, full, method):
        raise AdapterError(f"the plan {why}")
    if broadcast.spec_digest != spec.digest():
        raise AdapterError(
            f"the server's adapter spec is {broadcast.spec_digest[:12]}, this client's is "
            f"{spec.digest()[:12]}; both must hold the same base model, method, rank, "
            "targets and basis"
        )
    down = Coding(broadcast.plan.down)
    drawn = _drawn(broadcast, full, spec, method)
    tensors: dict[str, Tensor] = {}
    fold: dict[str, dict[str, Tensor]] = {}
    control: dict[str, Tensor] = {}
    for part, digest in broadcast.parts.items():
        if part == "basis":
            basis = decode_part(fetch(digest), digest, method.basis_shapes(full.layers))
            if tensors_digest(basis) != spec.basis_digest:
                raise AdapterError(
                    "the frozen basis that the server sent is not the one its spec names"
                )
            continue
        shapes = _shapes(part, broadcast, spec, method)
        coding = part_coding(part, down)
        if part.startswith(FOLD):
            fold[part.removeprefix(FOLD)] = decode_part(fetch(digest), digest, shapes, coding)
        elif part == "control":
            control = decode_part(fetch(digest), digest, shapes, coding)
        elif part.removeprefix(FACTOR) in broadcast.plan.kept and _holds(kept, shapes):
            tensors.update({name: kept[name] for name in shapes})
        elif digest in drawn:
            tensors.update(drawn[digest])
        else:
            tensors.update(decode_part(fetch(digest), digest, shapes, coding))
    missing = trained_shapes(spec, method).keys() - tensors.keys()
    if broadcast.plan.control and "control" not in broadcast.parts:
        missing |= {"control"}
    if missing:
        raise AdapterError(f"the broadcast lacks {', '.join(sorted(missing)[:3])}")
    return Start(AdapterState(spec, tensors), fold, control)


def _shapes(part: str, broadcast: Broadcast, spec: AdapterSpec, method: Method) -> Shapes:
    plan = broadcast.plan
    headless = replace(spec, head_shapes={})
    if part == HEADS:
        return dict(spec.head_shapes)
    if part == "control":
        heads = {} if HEADS in plan.kept else spec.head_shapes
        return trained_shapes(replace(spec, head_shapes=heads), method, plan.sent)
    if part.startswith(FOLD):
        ranks = broadcast.fold_ranks.get(part, ())
        if len(ranks) != len(spec.layers):
            raise AdapterError(f"the broadcast names no rank for every layer of {part[:64]!r}")
        shapes: dict[str, tuple[int, ...]] = {}
        for layer, rank in zip(spec.layers, ranks, strict=True):
            shapes[f"{layer.name}.L"] = (layer.out, rank)
            shapes[f"{layer.name}.Q"] = (rank, layer.inp)
        return shapes
    found = trained_shapes(headless, method, [part.removeprefix(FACTOR)])
    if not spec.layers or not found:
        raise AdapterError(f"the broadcast has an unknown part {part[:64]!r}")
    return found


def _drawn(
    broadcast: Broadcast, full: AdapterSpec, spec: AdapterSpec, method: Method
) -> dict[str, dict[str, Tensor]]:
    """Digest -> tensors of the parts that follow from the plan's seed."""
    seed = broadcast.plan.fresh
    if seed is None:
        return {}
    whole = {
        f"{layer.name}.{factor}": tensor
        for layer in full.layers
        for factor, tensor in method.fresh(layer, seed).items()
    }
    down = Coding(broadcast.plan.down)
    own = cut(AdapterState(full, whole), spec.rank, method).tensors
    found = {}
    for part in broadcast.parts:
        if part.startswith(FACTOR):
            factor = part.removeprefix(FACTOR)
            tensors = {name: t for name, t in own.items() if name.endswith(f".{factor}")}
            # what is drawn must be what a client that fetches it would find
            data = encode_coded(tensors, down)
            shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
            found[sha256(data)] = decode_coded(data, shapes, down)
    return found


def _holds(kept: Mapping[str, Tensor], shapes: Shapes) -> bool:
    return all(name in kept and tuple(kept[name].shape) == s for name, s in shapes.items())
