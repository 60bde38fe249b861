"""Quantisation: an update as a vector of integers whose sum cannot wrap.

Entry x of a tensor with clip c and a client of weight w becomes w q with |q| <= L levels,

    q = round(clamp(x, -c, c) L / c),    L = floor((2^(bits - 1) - 1) / W),

W the weight of everybody in the session, so that |sum w q| < 2^(bits - 1) whoever drops out.
Rounding is stochastic (up with the probability of the fraction), so that it has no bias. The
weighted mean of any clients is off by less than c / L per entry, but for entries beyond the
clip; these are counted.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedlora.errors import SecureAggregationError
from fedlora.privacy.secagg.masks import Vector, entry_type
from fedlora.privacy.secagg.session import Session

# float64 still has bits for the fraction that rounding decides on
MAX_LEVELS = 2**48
MIN_LEVELS = 2**10
MAX_LOSS = 1e3
# entries behind the tensors: saturated entries, loss, weight of those who have a loss
TAIL = 3


@dataclass(frozen=True)
class Mean:
    """What a sum says.

    Attributes:
        tensors: name -> weighted mean, flat, float64.
        saturated: entries that were clamped, over all clients.
        loss: weighted mean of the training losses of those who have one.
    """

    tensors: Mapping[str, Tensor]
    saturated: int
    loss: float | None


class Quantiser:
    """Updates to vectors, and their sums back to means.

    Args:
        session: has the tensors and their clips.
        total_weight: W.

    Raises:
        SecureAggregationError: so much weight leaves too few levels.
    """

    def __init__(self, session: Session, total_weight: int) -> None:
        self.session = session
        self.levels = min(MAX_LEVELS, (2 ** (session.bits - 1) - 1) // total_weight)
        if self.levels < MIN_LEVELS:
            raise SecureAggregationError(
                f"clients of weight {total_weight} in all leave {self.levels} levels of "
                f"{session.bits} bits; expected at least {MIN_LEVELS}; choose "
                "federation.secure_bits = 64, or equal weights"
            )

    @property
    def size(self) -> int:
        """Entries of a vector."""
        return vector_size(self.session)

    def vector(
        self,
        tensors: Mapping[str, Tensor],
        weight: int,
        loss: float | None,
        generator: torch.Generator,
    ) -> Vector:
        """One client's update, not yet masked.

        Args:
            tensors: name -> change, of any shape.
            weight: its own, as it was told to everybody.
            loss: mean training loss.
            generator: decides the rounding.

        Raises:
            SecureAggregationError: other tensors than the session's, or values that are not
                finite.
        """
        parts = self.session.parts
        if sorted(tensors) != [part.name for part in parts]:
            raise SecureAggregationError(
                f"an update with tensors {sorted(tensors)[:5]}; expected those of the session, "
                f"{[part.name for part in parts][:5]}"
            )
        flat = np.zeros(self.size, np.int64)
        saturated = at = 0
        for part in parts:
            values = tensors[part.name].detach().cpu().double().reshape(-1)
            if values.numel() != part.size:
                raise SecureAggregationError(
                    f"{part.name} has {values.numel()} entries; expected {part.size}"
                )
            if not bool(torch.isfinite(values).all()):
                raise SecureAggregationError(f"{part.name} holds NaN or infinity")
            saturated += int((values.abs() > part.clip).sum())
            scaled = values.clamp(-part.clip, part.clip) * (self.levels / part.clip)
            draws = torch.rand(part.size, generator=generator, dtype=torch.float64)
            rounded = (scaled + draws).floor().clamp(-self.levels, self.levels)
            flat[at : at + part.size] = rounded.numpy()
            at += part.size
        flat *= weight
        flat[at] = min(saturated, self.levels)
        if loss is not None and math.isfinite(loss):
            clamped = max(-MAX_LOSS, min(loss, MAX_LOSS))
            flat[at + 1] = round(clamped * (self.levels / MAX_LOSS)) * weight
            flat[at + 2] = weight
        # two's complement: the low bits of an int64 are the residue
        return flat.view(np.uint64).astype(entry_type(self.session.bits))

    def mean(self, total: Vector, weight: int) -> Mean:
        """The weighted mean in a sum of vectors of clients that weigh `weight` together."""
        signed = total.view(np.dtype(f"<i{self.session.bits // 8}")).astype(np.int64)
        tensors, at = {}, 0
        for part in self.session.parts:
            values = torch.from_numpy(signed[at : at + part.size].astype(np.float64))
            tensors[part.name] = values * (part.clip / self.levels) / weight
            at += part.size
        saturated, loss, heard = (int(value) for value in signed[at:])
        mean_loss = loss * (MAX_LOSS / self.levels) / heard if heard > 0 else None
        return Mean(tensors, saturated, mean_loss)


def vector_size(session: Session) -> int:
    """Entries of a vector: those of the tensors, and the tail."""
    return sum(part.size for part in session.parts) + TAIL
