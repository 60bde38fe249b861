"""Which rank slots a client trains: those that move most in a trial.

Koo et al., "Towards Robust and Efficient Federated Low-Rank Adaptation with Heterogeneous
Clients", https://arxiv.org/abs/2410.22815, section 4.
"""

from collections.abc import Sequence

from fedlora.adapter import AdapterSpec, Tensors
from fedlora.adapters.slots import SLOT_DIM, slot_mask, top_slots
from fedlora.training.terms import Freeze


def choose_slots(
    spec: AdapterSpec, factors: Sequence[str], start: Tensors, tried: Tensors, budget: int
) -> tuple[int, ...]:
    """One mask per layer with the `budget` best slots of all layers together.

    The score of slot j is ||change of its vector in the trained factor|| times ||its vector
    in the frozen one||.

    Args:
        factors: the trained factor, alone.
        start: tensors before the trial.
        tried: tensors after it.
    """
    (factor,) = factors
    other = next(name for name in SLOT_DIM if name != factor)
    scores = {}
    for layer in spec.layers:
        name = f"{layer.name}.{factor}"
        moved = (tried[name] - start[name]).double().norm(dim=1 - SLOT_DIM[factor])  # (r,)
        frozen = start[f"{layer.name}.{other}"].double().norm(dim=1 - SLOT_DIM[other])
        scores[layer.name] = moved * frozen
    return top_slots(scores, spec, budget)


def slot_freeze(
    spec: AdapterSpec, factors: Sequence[str], masks: Sequence[int], start: Tensors
) -> Freeze:
    """Keeps every slot outside the masks as it was."""
    return Freeze(
        {
            f"{layer.name}.{factor}": slot_mask(start[f"{layer.name}.{factor}"].shape, factor, mask)
            for layer, mask in zip(spec.layers, masks, strict=True)
            for factor in factors
        },
        start,
    )
