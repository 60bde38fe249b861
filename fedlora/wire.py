"""Values to bytes and back; the only place that decodes a peer's bytes.

A payload is a canonical safetensors file: names sorted by (element size descending, name),
no metadata, data contiguous, header padded with spaces to 8 bytes. Receiver and sender
both know names, shapes and dtypes beforehand, so the receiver builds the one legal header
and compares bytes. No parser ever sees a peer's header, and whatever passes is at the same
time an ordinary safetensors file.

A manifest is JSON of at most 64 KiB with exactly the expected fields.
"""

import functools
import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from types import NoneType
from typing import Any, get_args

import numpy as np
import torch

from fedlora.adapter import AdapterSpec, Tensors
from fedlora.compress import coded_shapes, compress, expand
from fedlora.errors import AdapterError
from fedlora.messages import (
    CONTROL,
    PLAIN,
    Broadcast,
    ClientUpdate,
    Coding,
    OptimizerState,
    PrivacyStatement,
    RoundPlan,
    Scheme,
)

MAX_MANIFEST_BYTES = 64 * 1024
MAX_TENSORS = 4096
NAME = re.compile(r"[A-Za-z0-9._\-]{1,256}")
DIGEST = re.compile(r"[0-9a-f]{64}")
MASK = re.compile(r"[0-9a-f]{1,1024}")

Shapes = Mapping[str, tuple[int, ...]]

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int8: "I8",
    torch.uint8: "U8",
}
_BY_CODE = {code: dtype for dtype, code in _DTYPES.items()}


def sha256(data: bytes | memoryview) -> str:
    """Hex SHA-256 of `data`."""
    return hashlib.sha256(data).hexdigest()


@dataclass(frozen=True)
class Slot:
    """Where one tensor lies in a canonical file: bytes `start` to `end`, header included."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Layout:
    """A canonical file but for its data.

    Attributes:
        header: the one legal header, length prefix included.
        slots: by name, in the order of the data.
        total: bytes of the whole file.
    """

    header: bytes
    slots: Mapping[str, Slot]
    total: int


def layout(
    shapes: Shapes, dtypes: Mapping[str, torch.dtype] | torch.dtype = torch.float32
) -> Layout:
    """The layout of the canonical file for these tensors; kept for the next call.

    Args:
        shapes: name -> shape.
        dtypes: one dtype for all, or name -> dtype.
    """
    if isinstance(dtypes, torch.dtype):
        return _layout(tuple(shapes), tuple(map(tuple, shapes.values())), dtypes)
    return _layout(
        tuple(shapes), tuple(map(tuple, shapes.values())), tuple(dtypes[name] for name in shapes)
    )


# all clients of a round have the same few layouts
@functools.lru_cache(maxsize=32)
def _layout(
    names: tuple[str, ...],
    shapes: tuple[tuple[int, ...], ...],
    dtypes: torch.dtype | tuple[torch.dtype, ...],
) -> Layout:
    if isinstance(dtypes, torch.dtype):
        dtypes = (dtypes,) * len(names)
    by_name = dict(zip(names, zip(shapes, dtypes, strict=True), strict=True))
    order = canonical_order(
        dict(zip(names, shapes, strict=True)), dict(zip(names, dtypes, strict=True))
    )
    offset = 0
    entries: dict[str, Any] = {}
    for name in order:
        shape, dtype = by_name[name]
        end = offset + math.prod(shape) * dtype.itemsize
        entries[name] = {
            "dtype": _DTYPES[dtype],
            "shape": list(shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    slots = {}
    for name in order:
        start, end = entries[name]["data_offsets"]
        shape, dtype = by_name[name]
        slots[name] = Slot(dtype, shape, len(head) + start, len(head) + end)
    return Layout(head, slots, len(head) + offset)


def header(
    shapes: Shapes, dtypes: Mapping[str, torch.dtype] | torch.dtype = torch.float32
) -> bytes:
    """The one legal safetensors header (length prefix included) for these tensors.

    Args:
        shapes: name -> shape.
        dtypes: one dtype for all, or name -> dtype.
    """
    return layout(shapes, dtypes).header


def canonical_order(
    shapes: Shapes, dtypes: Mapping[str, torch.dtype] | torch.dtype = torch.float32
) -> list[str]:
    """Names in the order of their data: wide elements first, then by name."""
    if isinstance(dtypes, torch.dtype):
        return sorted(shapes)
    return sorted(shapes, key=lambda name: (-dtypes[name].itemsize, name))


def encode_tensors(tensors: Tensors) -> bytes:
    """Canonical safetensors bytes of `tensors`, dtypes kept.

    Raises:
        AdapterError: a name or dtype that the format does not carry.
    """
    for name, tensor in tensors.items():
        if not NAME.fullmatch(name):
            raise AdapterError(
                f"tensor name {name[:80]!r} is not allowed; expected 1 to 256 of A-Z a-z 0-9 . _ -"
            )
        if tensor.dtype not in _DTYPES:
            raise AdapterError(
                f"{name} has dtype {tensor.dtype}; expected one of {', '.join(_DTYPES.values())}"
            )
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    dtypes = {name: tensor.dtype for name, tensor in tensors.items()}
    form = layout(shapes, dtypes)
    return b"".join([form.header, *(_raw(tensors[name]) for name in form.slots)])


def decode_tensors(
    data: bytes,
    shapes: Shapes,
    dtypes: Mapping[str, torch.dtype] | torch.dtype = torch.float32,
) -> dict[str, torch.Tensor]:
    """The tensors in `data`, which must be exactly the canonical file for `shapes`.

    Returned tensors own their memory.

    Raises:
        AdapterError: length or header differ by a single byte.
    """
    if len(shapes) > MAX_TENSORS:
        raise AdapterError(f"{len(shapes)} tensors expected; the limit is {MAX_TENSORS}")
    return _decode(data, shapes, dtypes)


def coded_layout(shapes: Shapes, coding: Coding) -> Layout:
    """The layout of the canonical file that float32 tensors of these shapes become."""
    return layout(shapes) if coding.plain else layout(*coded_shapes(shapes, coding))


def encode_coded(tensors: Tensors, coding: Coding) -> bytes:
    """Canonical safetensors bytes of float32 tensors, coded.

    Raises:
        AdapterError: see `encode_tensors`.
    """
    return encode_tensors(tensors if coding.plain else compress(tensors, coding))


def decode_coded(data: bytes, shapes: Shapes, coding: Coding) -> dict[str, torch.Tensor]:
    """The float32 tensors in `data`, the canonical file for `shapes`, coded.

    Raises:
        AdapterError: length or header differ by a single byte.
        CodeError: a value that no encoder makes.
    """
    if coding.plain:
        return decode_tensors(data, shapes)
    return expand(decode_tensors(data, *coded_shapes(shapes, coding)), shapes, coding)


def _decode(
    data: bytes, shapes: Shapes, dtypes: Mapping[str, torch.dtype] | torch.dtype
) -> dict[str, torch.Tensor]:
    form = layout(shapes, dtypes)
    if len(data) != form.total:
        raise AdapterError(f"payload has {len(data)} bytes; expected {form.total}")
    if data[: len(form.header)] != form.header:
        raise AdapterError(
            "payload header differs from the expected one: another name, shape, dtype or offset"
        )
    tensors: dict[str, torch.Tensor] = {}
    view = memoryview(data)
    for name, slot in form.slots.items():
        if slot.start < slot.end:
            flat = torch.frombuffer(bytearray(view[slot.start : slot.end]), dtype=slot.dtype)
        else:
            flat = torch.empty(0, dtype=slot.dtype)
        tensors[name] = flat.reshape(slot.shape)
    return tensors


def encode_json(value: Any) -> bytes:
    """Canonical JSON: sorted keys, no spaces, no NaN or Infinity."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


PLAN_FIELDS: dict[str, type | tuple[type, ...]] = {
    "run": str,
    "round": int,
    "attempt": int,
    "client": str,
    "factors": list,
    "rank": int,
    "local_steps": int,
    "optimizer_state": str,
    "kept": list,
    "fresh": (int, NoneType),
    "rates": dict,
    "proximal": (int, float),
    "proximal_product": bool,
    "control": bool,
    "tail_slot": int,
    "tail_weight": (int, float),
    "slots": int,
    "trial_steps": int,
    "up": str,
    "top_k": (int, float),
    "down": str,
    "feedback": bool,
}
MAX_FOLD_VERSIONS = 1024


def encode_broadcast(broadcast: Broadcast) -> bytes:
    """The manifest of a broadcast; its parts travel by digest."""
    value = {
        "plan": vars(broadcast.plan),
        "spec_digest": broadcast.spec_digest,
        "parts": dict(broadcast.parts),
        "fold_ranks": dict(broadcast.fold_ranks),
    }
    return encode_json(value)


def decode_broadcast(manifest: bytes) -> Broadcast:
    """The broadcast in a manifest.

    Raises:
        AdapterError: not readable, or other fields than expected.
    """
    fields = _object(
        manifest, {"plan": dict, "spec_digest": str, "parts": dict, "fold_ranks": dict}
    )
    plan, parts, folds = fields["plan"], fields["parts"], fields["fold_ranks"]
    _check_types(plan, PLAN_FIELDS)
    texts = [*plan["factors"], *plan["kept"], *parts.values()]
    numbers = [*plan["rates"].values(), plan["proximal"], plan["tail_weight"]]
    counts = [plan["local_steps"], plan["tail_slot"], plan["slots"], plan["trial_steps"]]
    if (
        plan["round"] < 1
        or plan["attempt"] < 0
        or plan["rank"] < 1
        or min(counts) < 0
        or plan["optimizer_state"] not in get_args(OptimizerState)
        or plan["up"] not in get_args(Scheme)
        or plan["down"] not in get_args(Scheme)
        or not 0 < plan["top_k"] <= 1
        or not all(isinstance(text, str) for text in texts)
        or not all(DIGEST.fullmatch(digest) for digest in parts.values())
        or not all(NAME.fullmatch(part) for part in parts)
        or not all(type(n) in (int, float) and 0 <= n < 1e30 for n in numbers)
        or len(folds) > MAX_FOLD_VERSIONS
        or not all(isinstance(ranks, list) for ranks in folds.values())
        or not all(type(n) is int and n >= 0 for ranks in folds.values() for n in ranks)
    ):
        raise AdapterError("round plan is not readable: a value is out of its bounds")
    plan = RoundPlan(**{**plan, "factors": tuple(plan["factors"]), "kept": tuple(plan["kept"])})
    return Broadcast(
        plan, fields["spec_digest"], parts, {k: tuple(ranks) for k, ranks in folds.items()}
    )


def decode_part(
    data: bytes, digest: str, shapes: Shapes, coding: Coding = PLAIN
) -> dict[str, torch.Tensor]:
    """The tensors of one part of a broadcast.

    Raises:
        AdapterError: another digest or another header than expected, or a value that no
            encoder makes.
    """
    if sha256(data) != digest:
        raise AdapterError(
            f"a part of the broadcast has digest {sha256(data)[:12]}, not {digest[:12]}"
        )
    return decode_coded(data, shapes, coding)


UPDATE_FIELDS: dict[str, type | tuple[type, ...]] = {
    "run": str,
    "round": int,
    "attempt": int,
    "client": str,
    "start_sha256": str,
    "spec": str,
    "base_fingerprint": str,
    "size_bytes": int,
    "sha256": str,
    "num_examples": (int, float),
    "metrics": dict,
    "slots": (list, NoneType),
    "privacy": (dict, NoneType),
}
PRIVACY_FIELDS: dict[str, type | tuple[type, ...]] = {
    "unit": str,
    "epsilon": (float, NoneType),
    "delta": float,
    "noise_multiplier": float,
    "clip": float,
    "steps": int,
    "accountant": str,
    "noise": str,
    "entry": int,
    "head": str,
}


# the clients of one process share a spec: the last one and its digest
_last_spec: tuple[AdapterSpec, str] | None = None


def _spec_digest(spec: AdapterSpec) -> str:
    global _last_spec
    last = _last_spec
    if last is None or last[0] is not spec:
        _last_spec = last = (spec, spec.digest())
    return last[1]


def encode_update(update: ClientUpdate) -> tuple[bytes, bytes]:
    """(manifest, payload) of a client's update."""
    control = {f"{CONTROL}{name}": tensor for name, tensor in update.control.items()}
    payload = encode_coded({**update.delta.tensors, **control}, update.coding)
    value = {
        "run": update.run,
        "round": update.round,
        "attempt": update.attempt,
        "client": update.client,
        "start_sha256": update.start_sha256,
        "spec": _spec_digest(update.delta.spec),
        "base_fingerprint": update.delta.spec.base_fingerprint,
        "size_bytes": len(payload),
        "sha256": sha256(payload),
        "num_examples": update.num_examples,
        "metrics": dict(update.metrics),
        "slots": None if update.slots is None else [f"{mask:x}" for mask in update.slots],
        "privacy": None if update.privacy is None else asdict(update.privacy),
    }
    return encode_json(value), payload


def decode_update_manifest(manifest: bytes) -> dict[str, Any]:
    """The fields of an update's manifest, types checked, values not yet believed.

    Raises:
        AdapterError: too large, not JSON, or other fields than `UPDATE_FIELDS`.
    """
    fields = _object(manifest, UPDATE_FIELDS)
    for key, value in fields["metrics"].items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not NAME.fullmatch(key):
            raise AdapterError(f"metrics.{key[:40]!r} is not a plain number")
        if not math.isfinite(value):
            raise AdapterError(f"metrics.{key} is not finite")
    if fields["slots"] is not None:
        masks = fields["slots"]
        if not all(isinstance(m, str) and MASK.fullmatch(m) for m in masks):
            raise AdapterError("slots is not a list of hexadecimal bit masks")
        fields["slots"] = tuple(int(mask, 16) for mask in masks)
    if fields["privacy"] is not None:
        fields["privacy"] = _statement(fields["privacy"])
    return fields


def _statement(value: dict[str, Any]) -> PrivacyStatement:
    _check_types(value, PRIVACY_FIELDS, "privacy")
    numbers = [n for n in value.values() if isinstance(n, int | float)]
    if not all(math.isfinite(n) and n >= 0 for n in numbers):
        raise AdapterError("privacy holds a number that is negative or not finite")
    texts = [text for text in value.values() if isinstance(text, str)]
    if not all(NAME.fullmatch(text) for text in texts):
        raise AdapterError("privacy holds a text that is no plain name")
    return PrivacyStatement(**value)


def _object(data: bytes, types: Mapping[str, type | tuple[type, ...]]) -> dict[str, Any]:
    if len(data) > MAX_MANIFEST_BYTES:
        raise AdapterError(f"manifest has {len(data)} bytes; the limit is {MAX_MANIFEST_BYTES}")
    try:
        value = json.loads(
            data,
            parse_int=_int64,
            parse_constant=_no_constant,
            object_pairs_hook=_no_repeat,
        )
    except (ValueError, RecursionError) as e:
        raise AdapterError(f"manifest is not JSON: {e}") from e
    if not isinstance(value, dict):
        raise AdapterError(f"manifest is a {type(value).__name__}; expected an object")
    _check_types(value, types)
    return value


def _check_types(
    value: dict[str, Any], types: Mapping[str, type | tuple[type, ...]], what: str = "manifest"
) -> None:
    if value.keys() != types.keys():
        found = str(sorted(value))
        raise AdapterError(f"{what} has fields {found[:300]}; expected {sorted(types)}")
    for key, kind in types.items():
        is_bool = isinstance(value[key], bool)
        if is_bool != (kind is bool) or not isinstance(value[key], kind):
            raise AdapterError(f"{what} field {key} is a {type(value[key]).__name__}")


def _int64(text: str) -> int:
    value = int(text)
    if abs(value) >= 2**63:
        raise ValueError("an integer is larger than 64 bits")
    return value


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not allowed")


def _no_repeat(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("a key is repeated")
    return value


def _raw(tensor: torch.Tensor) -> bytes:
    tensor = tensor.detach().to("cpu").contiguous()
    if tensor.dtype == torch.bfloat16:
        tensor = tensor.view(torch.int16)
    array: np.ndarray[Any, Any] = tensor.numpy()
    return array.tobytes()


def decode_own(data: bytes) -> dict[str, torch.Tensor]:
    """Tensors of a file this machine wrote itself and whose digest was checked.

    Reads the header instead of comparing it; never for a peer's bytes.

    Raises:
        AdapterError: not a safetensors file.
    """
    try:
        size = int.from_bytes(data[:8], "little")
        entries = json.loads(data[8 : 8 + size])
        if not all(NAME.fullmatch(name) for name in entries):
            raise ValueError("a tensor name is not allowed")
        # True and 1.0 equal 1, and would be taken for it by the cache of layouts
        if any(type(n) is not int or n < 0 for e in entries.values() for n in e["shape"]):
            raise ValueError("a shape does not consist of lengths")
        shapes = {name: tuple(entry["shape"]) for name, entry in entries.items()}
        dtypes = {name: _BY_CODE[entry["dtype"]] for name, entry in entries.items()}
        return _decode(data, shapes, dtypes)
    # a length beyond 64 bits fails at any use
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, OverflowError) as e:
        raise AdapterError(f"not a safetensors file of fedlora: {e}") from e
