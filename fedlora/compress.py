"""Compression: float32 tensors as fewer bits, and back.

Coded tensors travel as up to three arrays, in which all tensors stand one after the other,
sorted by name, so that the header stays short however many there are:

    values  kept entries: float32, bfloat16, int8, or int4 two to a byte (low half first)
    scale   int8 and int4: one bfloat16 for each block of 64 kept entries of a tensor
    index   where a tensor's kept entries are, if not all are kept: a bit mask, or their
            positions in as few bytes each as the tensor's size allows, whichever is shorter

Their sizes follow from the tensors' shapes alone, so that the receiver knows every byte of
the header beforehand. Decoding is exact, an integer below 128 times a scale of 8 significant
bits, and so is the same on every machine.

int8 and int4 round to the nearest multiple of the block's scale, max |x| / 127 or / 7, and
so do not change what they have rounded before. top-k keeps the largest entries of each tensor,
Stich et al., "Sparsified SGD with Memory", https://arxiv.org/abs/1809.07599, definition 2.1;
of equal ones the first. No error is larger than its entry, and that of the largest entry of a
block is next to nothing: all of them contract, which error feedback needs.
"""

from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from fedlora.adapter import Tensors
from fedlora.config.job import CompressionSection
from fedlora.errors import CodeError
from fedlora.messages import Coding, Compression
from fedlora.ops.delta_codec import BLOCK, decode, quantise

VALUES, SCALE, INDEX = "values", "scale", "index"

_DTYPES = {
    "none": torch.float32,
    "bf16": torch.bfloat16,
    "int8": torch.int8,
    "int4": torch.uint8,
}
_LEVELS = {"int8": 127, "int4": 7}

Shapes = Mapping[str, tuple[int, ...]]


def agreed(section: CompressionSection) -> Compression:
    """What a job says, in the terms of server and clients."""
    return Compression(
        Coding(section.up, section.top_k), Coding(section.down), section.error_feedback
    )


def coded_shapes(
    shapes: Shapes, coding: Coding
) -> tuple[dict[str, tuple[int, ...]], dict[str, torch.dtype]]:
    """(shapes, dtypes) of the arrays that tensors of these shapes become."""
    sizes = [_sizes(int(torch.Size(shape).numel()), coding) for shape in shapes.values()]
    found: dict[str, tuple[int, ...]] = {VALUES: (sum(values for values, _, _ in sizes),)}
    dtypes = {VALUES: _DTYPES[coding.scheme]}
    if coding.scheme in _LEVELS:
        found[SCALE] = (sum(scales for _, scales, _ in sizes),)
        dtypes[SCALE] = torch.bfloat16
    if coding.top_k < 1:
        found[INDEX] = (sum(index for _, _, index in sizes),)
        dtypes[INDEX] = torch.uint8
    return found, dtypes


def compress(tensors: Tensors, coding: Coding) -> dict[str, Tensor]:
    """The arrays of `tensors` (float32).

    What is not finite stays so, in the values or in a scale, and is refused by the receiver.
    """
    parts: dict[str, list[Tensor]] = {name: [] for name in coded_shapes({}, coding)[0]}
    for name in sorted(tensors):
        flat = tensors[name].detach().to("cpu", torch.float32).reshape(-1)
        if coding.top_k < 1:
            kept = _largest(flat, kept_entries(flat.numel(), coding))
            parts[INDEX].append(_index(kept, flat.numel()))
            flat = flat[kept]
        if coding.scheme in _LEVELS:
            codes, scales = quantise(flat, _LEVELS[coding.scheme])
            parts[SCALE].append(scales)
            flat = _packed(codes) if coding.scheme == "int4" else codes
        parts[VALUES].append(flat.to(_DTYPES[coding.scheme]))
    dtypes = coded_shapes({}, coding)[1]
    return {
        name: torch.cat(found) if found else torch.empty(0, dtype=dtypes[name])
        for name, found in parts.items()
    }


def expand(arrays: Tensors, shapes: Shapes, coding: Coding) -> dict[str, Tensor]:
    """The tensors (float32) that became `arrays`, whose sizes are those of `coded_shapes`.

    Raises:
        CodeError: a scale or an index that no encoder makes.
    """
    names = sorted(shapes)
    counts = [int(torch.Size(shapes[name]).numel()) for name in names]
    sizes = [_sizes(count, coding) for count in counts]
    cut = {
        array: _pieces(arrays[array], [size[i] for size in sizes])
        for i, array in enumerate((VALUES, SCALE, INDEX))
        if array in arrays
    }
    tensors = {}
    for i, (name, count) in enumerate(zip(names, counts, strict=True)):
        kept = kept_entries(count, coding)
        values = cut[VALUES][i]
        if coding.scheme in _LEVELS:
            codes = _unpacked(name, values, kept) if coding.scheme == "int4" else values
            values = _multiplied(name, codes, cut[SCALE][i], _LEVELS[coding.scheme])
        flat = values.float()
        if coding.top_k < 1:
            whole = torch.zeros(count)
            whole[_positions(name, cut[INDEX][i], count, kept)] = flat
            flat = whole
        tensors[name] = flat.reshape(shapes[name])
    return tensors


def round_trip(tensors: Tensors, coding: Coding) -> dict[str, Tensor]:
    """What the receiver of `tensors` finds, or would if it were finite."""
    if coding.plain:
        return dict(tensors)
    finite = {name: torch.nan_to_num(t, 0.0, 0.0, 0.0) for name, t in tensors.items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    return expand(compress(finite, coding), shapes, coding)


def kept_entries(count: int, coding: Coding) -> int:
    """How many of `count` entries travel: at least one of any."""
    return count if coding.top_k == 1 else min(count, max(1, round(coding.top_k * count)))


def _sizes(count: int, coding: Coding) -> tuple[int, int, int]:
    """Lengths of the values, scales and index of a tensor with `count` entries."""
    kept = kept_entries(count, coding)
    values = (kept + 1) // 2 if coding.scheme == "int4" else kept
    index = 0 if coding.top_k == 1 else min(_mask_bytes(count), kept * _width(count))
    return values, -(-kept // BLOCK), index


def _pieces(array: Tensor, lengths: Sequence[int]) -> list[Tensor]:
    ends = accumulate(lengths, initial=0)
    return [array[start:end] for start, end in pairwise(ends)]


def _largest(flat: Tensor, kept: int) -> Tensor:
    """Ascending positions of the `kept` largest entries by size."""
    order = torch.sort(flat.abs(), descending=True, stable=True).indices
    return order[:kept].sort().values


def _multiplied(name: str, codes: Tensor, scales: Tensor, levels: int) -> Tensor:
    if bool((codes < -levels).any()):
        raise CodeError(f"{name} has a code below {-levels}; expected {-levels} to {levels}")
    wide = scales.float()
    if not bool(torch.isfinite(wide).all()) or bool(torch.signbit(wide).any()):
        raise CodeError(f"{name} has a scale that is negative or not finite")
    return decode(codes, scales)


def _packed(codes: Tensor) -> Tensor:
    halves = pad(codes, (0, codes.numel() % 2)).reshape(-1, 2) & 15
    return (halves[:, 0] | halves[:, 1] << 4).to(torch.uint8)


def _unpacked(name: str, packed: Tensor, count: int) -> Tensor:
    halves = torch.stack([packed & 15, packed >> 4], 1).reshape(-1).to(torch.int8)
    if bool(halves[count:].any()):
        raise CodeError(f"{name} has a code after the last one; expected zero")
    return torch.where(halves > 7, halves - 16, halves)[:count]


def _mask_bytes(count: int) -> int:
    return (count + 7) // 8


def _width(count: int) -> int:
    """Bytes of one position among `count`."""
    return max(1, (max(count - 1, 0).bit_length() + 7) // 8)


def _as_mask(count: int, kept: int) -> bool:
    return _mask_bytes(count) <= kept * _width(count)


def _index(kept: Tensor, count: int) -> Tensor:
    positions = kept.numpy()
    if _as_mask(count, len(positions)):
        mask = np.zeros(count, bool)
        mask[positions] = True
        return torch.from_numpy(np.packbits(mask, bitorder="little"))
    octets = positions.astype("<i8").view(np.uint8).reshape(-1, 8)
    return torch.from_numpy(octets[:, : _width(count)].flatten())


def _positions(name: str, index: Tensor, count: int, kept: int) -> Tensor:
    octets = index.numpy()
    if _as_mask(count, kept):
        bits = np.unpackbits(octets, bitorder="little")
        positions = np.flatnonzero(bits)
        if len(positions) != kept or bits[count:].any():
            raise CodeError(
                f"the bit mask of {name} names {len(positions)} entries; expected {kept} of {count}"
            )
        return torch.from_numpy(positions)
    wide = np.zeros((kept, 8), np.uint8)
    wide[:, : _width(count)] = octets.reshape(kept, -1)
    positions = wide.view("<i8").reshape(-1).astype(np.int64)
    if (np.diff(positions) <= 0).any() or (positions >= count).any():
        raise CodeError(
            f"the positions of {name} do not ascend, or one is beyond its {count} entries"
        )
    return torch.from_numpy(positions)
