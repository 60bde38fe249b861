"""Values to bytes and back; the only place that decodes a peer's bytes.

A payload is a canonical safetensors file: names sorted by (element size descending, name),
no metadata, data contiguous, header padded with spaces to 8 bytes. Receiver and sender
both know names, shapes and dtypes beforehand, so the receiver builds the one legal header
and compares bytes. No parser ever sees a peer's header, and whatever passes is at the same
time an ordinary safetensors file.

A manifest is JSON of at most 64 KiB with exactly the expected fields.
"""

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from fedlora.adapter import Tensors
from fedlora.errors import AdapterError
from fedlora.messages import Broadcast, ClientUpdate, RoundPlan

MAX_MANIFEST_BYTES = 64 * 1024
MAX_TENSORS = 4096
NAME = re.compile(r"[A-Za-z0-9._\-]{1,256}")

Shapes = Mapping[str, tuple[int, ...]]

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
}
_BY_CODE = {code: dtype for dtype, code in _DTYPES.items()}


def sha256(data: bytes | memoryview) -> str:
    """Hex SHA-256 of `data`."""
    return hashlib.sha256(data).hexdigest()


def header(
    shapes: Shapes, dtypes: Mapping[str, torch.dtype] | torch.dtype = torch.float32
) -> bytes:
    """The one legal safetensors header (length prefix included) for these tensors.

    Args:
        shapes: name -> shape.
        dtypes: one dtype for all, or name -> dtype.
    """
    offset = 0
    entries: dict[str, Any] = {}
    for name in canonical_order(shapes, dtypes):
        dtype = dtypes if isinstance(dtypes, torch.dtype) else dtypes[name]
        end = offset + math.prod(shapes[name]) * dtype.itemsize
        entries[name] = {
            "dtype": _DTYPES[dtype],
            "shape": list(shapes[name]),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


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
    parts = [header(shapes, dtypes)]
    parts += [_raw(tensors[name]) for name in canonical_order(shapes, dtypes)]
    return b"".join(parts)


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
    expected = header(shapes, dtypes)
    sizes = {
        name: math.prod(shape)
        * (dtypes if isinstance(dtypes, torch.dtype) else dtypes[name]).itemsize
        for name, shape in shapes.items()
    }
    total = len(expected) + sum(sizes.values())
    if len(data) != total:
        raise AdapterError(f"payload has {len(data)} bytes; expected {total}")
    if data[: len(expected)] != expected:
        raise AdapterError(
            "payload header differs from the expected one: another name, shape, dtype or offset"
        )
    tensors: dict[str, torch.Tensor] = {}
    offset = len(expected)
    for name in canonical_order(shapes, dtypes):
        dtype = dtypes if isinstance(dtypes, torch.dtype) else dtypes[name]
        count = math.prod(shapes[name])
        if count:
            flat = torch.frombuffer(bytearray(data[offset : offset + sizes[name]]), dtype=dtype)
        else:
            flat = torch.empty(0, dtype=dtype)
        tensors[name] = flat.reshape(shapes[name])
        offset += sizes[name]
    return tensors


def encode_json(value: Any) -> bytes:
    """Canonical JSON: sorted keys, no spaces, no NaN or Infinity."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def encode_broadcast(broadcast: Broadcast) -> bytes:
    """The manifest of a broadcast; its parts travel by digest."""
    value = {
        "plan": dataclasses.asdict(broadcast.plan),
        "spec_digest": broadcast.spec_digest,
        "parts": dict(broadcast.parts),
    }
    return encode_json(value)


def decode_broadcast(manifest: bytes) -> Broadcast:
    """The broadcast in a manifest.

    Raises:
        AdapterError: not readable, or other fields than expected.
    """
    fields = _object(manifest, {"plan": dict, "spec_digest": str, "parts": dict})
    try:
        plan = RoundPlan(**{**fields["plan"], "factors": tuple(fields["plan"]["factors"])})
    except (KeyError, TypeError) as e:
        raise AdapterError(f"round plan is not readable: {e}") from e
    return Broadcast(plan, fields["spec_digest"], fields["parts"])


def decode_part(data: bytes, digest: str, shapes: Shapes) -> dict[str, torch.Tensor]:
    """The tensors of one part of a broadcast.

    Raises:
        AdapterError: another digest or another header than expected.
    """
    if sha256(data) != digest:
        raise AdapterError(
            f"a part of the broadcast has digest {sha256(data)[:12]}, not {digest[:12]}"
        )
    return decode_tensors(data, shapes)


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
}


def encode_update(update: ClientUpdate) -> tuple[bytes, bytes]:
    """(manifest, payload) of a client's update."""
    payload = encode_tensors(update.delta.tensors)
    value = {
        "run": update.run,
        "round": update.round,
        "attempt": update.attempt,
        "client": update.client,
        "start_sha256": update.start_sha256,
        "spec": update.delta.spec.digest(),
        "base_fingerprint": update.delta.spec.base_fingerprint,
        "size_bytes": len(payload),
        "sha256": sha256(payload),
        "num_examples": update.num_examples,
        "metrics": dict(update.metrics),
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
    return fields


def _object(data: bytes, types: Mapping[str, type | tuple[type, ...]]) -> dict[str, Any]:
    if len(data) > MAX_MANIFEST_BYTES:
        raise AdapterError(f"manifest has {len(data)} bytes; the limit is {MAX_MANIFEST_BYTES}")
    try:
        value = json.loads(data, parse_constant=_no_constant, object_pairs_hook=_no_repeat)
    except (ValueError, RecursionError) as e:
        raise AdapterError(f"manifest is not JSON: {e}") from e
    if not isinstance(value, dict) or value.keys() != types.keys():
        found = sorted(value) if isinstance(value, dict) else type(value).__name__
        raise AdapterError(f"manifest has fields {found}; expected {sorted(types)}")
    for key, kind in types.items():
        if isinstance(value[key], bool) or not isinstance(value[key], kind):
            raise AdapterError(f"manifest field {key} is a {type(value[key]).__name__}")
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
        shapes = {name: tuple(entry["shape"]) for name, entry in entries.items()}
        dtypes = {name: _BY_CODE[entry["dtype"]] for name, entry in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise AdapterError(f"not a safetensors file of fedlora: {e}") from e
    return decode_tensors(data, shapes, dtypes)
