"""Rank slots of an s B A adapter that travel alone: columns of B, or rows of A.

A mask per layer, bit j for slot j, says which slots are in a packed tensor.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedlora.adapter import AdapterSpec, LayerSpec, Tensors

# dimension of a factor that runs over its slots
SLOT_DIM = {"A": 0, "B": 1}


def indices(mask: int, rank: int) -> list[int]:
    """The slots in a mask, ascending."""
    return [slot for slot in range(rank) if mask >> slot & 1]


def packed_shapes(
    spec: AdapterSpec, factors: Sequence[str], masks: Sequence[int]
) -> dict[str, tuple[int, ...]]:
    """Shapes of the packed factors of every layer, and of the heads; empty ones are left out."""
    shapes: dict[str, tuple[int, ...]] = {}
    for layer, mask in zip(spec.layers, masks, strict=True):
        count = mask.bit_count()
        for factor in factors:
            if count:
                full = (count, layer.inp) if SLOT_DIM[factor] == 0 else (layer.out, count)
                shapes[f"{layer.name}.{factor}"] = full
    shapes.update(spec.head_shapes)
    return dict(sorted(shapes.items()))


def pack(
    tensors: Tensors, spec: AdapterSpec, factors: Sequence[str], masks: Sequence[int]
) -> dict[str, Tensor]:
    """`tensors` with only the slots of the masks."""
    packed = {name: tensors[name] for name in spec.head_shapes}
    for layer, mask in zip(spec.layers, masks, strict=True):
        if chosen := indices(mask, layer.rank):
            for factor in factors:
                name = f"{layer.name}.{factor}"
                packed[name] = tensors[name].index_select(SLOT_DIM[factor], torch.tensor(chosen))
    return packed


def unpack(
    packed: Tensors, spec: AdapterSpec, factors: Sequence[str], masks: Sequence[int]
) -> dict[str, Tensor]:
    """The packed tensors at full rank, zero in the slots that are not in the masks."""
    tensors = {name: packed[name] for name in spec.head_shapes}
    for layer, mask in zip(spec.layers, masks, strict=True):
        chosen = indices(mask, layer.rank)
        for factor in factors:
            name = f"{layer.name}.{factor}"
            full = torch.zeros(_shape(layer, factor))
            if chosen:
                full.index_copy_(SLOT_DIM[factor], torch.tensor(chosen), packed[name])
            tensors[name] = full
    return tensors


def slot_mask(shape: Sequence[int], factor: str, mask: int) -> Tensor:
    """1 in the slots of `mask`, 0 elsewhere, broadcastable to a factor of this shape."""
    dim = SLOT_DIM[factor]
    ones = torch.zeros(shape[dim])
    ones[indices(mask, shape[dim])] = 1.0
    return ones[:, None] if dim == 0 else ones[None, :]


def top_slots(scores: Mapping[str, Tensor], spec: AdapterSpec, budget: int) -> tuple[int, ...]:
    """Masks of the `budget` slots with the largest scores over all layers together.

    Ties go to the earlier layer, then the earlier slot.

    Args:
        scores: layer -> score of every slot, (r,).
    """
    ranked = sorted(
        (-float(score), index, slot)
        for index, layer in enumerate(spec.layers)
        for slot, score in enumerate(scores[layer.name])
    )
    masks = [0] * len(spec.layers)
    for _, index, slot in ranked[:budget]:
        masks[index] |= 1 << slot
    return tuple(masks)


def _shape(layer: LayerSpec, factor: str) -> tuple[int, int]:
    return (layer.rank, layer.inp) if SLOT_DIM[factor] == 0 else (layer.out, layer.rank)
