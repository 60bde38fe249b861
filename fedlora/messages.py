"""What server and clients say to each other.

A message is a small JSON manifest and a canonical safetensors payload. The manifest is
checked first and says what the payload must be, byte for byte (`fedlora.wire`).
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from fedlora.adapter import AdapterState

OptimizerState = Literal["reset", "keep"]


@dataclass(frozen=True)
class RoundPlan:
    """What one client does in one round.

    Attributes:
        run: lineage id of the run, the same across resumes.
        round: 1-based.
        attempt: 0-based; a round below quorum is tried again with the next number.
        client: name of the client the plan is for.
        factors: names of the factors that are trained and sent; the others stay frozen.
        rank: rank of the adapter this client holds.
        local_steps: optimiser steps.
        optimizer_state: "keep" continues the client's own moments of its last round.
    """

    run: str
    round: int
    attempt: int
    client: str
    factors: tuple[str, ...]
    rank: int
    local_steps: int
    optimizer_state: OptimizerState = "reset"


@dataclass(frozen=True)
class Broadcast:
    """Server to client: what to do, and the adapter to start from.

    The adapter travels in parts (one per factor, one for the heads, one for the frozen
    basis), each named by the digest of its bytes, so that a client fetches only what it
    does not hold already.

    Attributes:
        plan: what to do.
        spec_digest: digest of the spec that the parts belong to.
        parts: part name -> SHA-256 of its canonical bytes.
    """

    plan: RoundPlan
    spec_digest: str
    parts: Mapping[str, str]

    @property
    def start_sha256(self) -> str:
        """Names the starting adapter as a whole; the client's update must quote it."""
        text = "".join(f"{name}:{digest};" for name, digest in sorted(self.parts.items()))
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class ClientUpdate:
    """Client to server: trained minus broadcast, for the planned factors only.

    Attributes:
        run, round, attempt, client: copied from the plan.
        start_sha256: digest of the broadcast payload that was trained on.
        delta: the change of every planned factor and head parameter.
        num_examples: examples the client trains on; its weight in the average.
        metrics: plain numbers about the client's own training and validation.
        start: what the client started from; attached on arrival, never sent.
        weight: its weight in the average, not normalised; attached on arrival.
    """

    run: str
    round: int
    attempt: int
    client: str
    start_sha256: str
    delta: AdapterState
    num_examples: float
    metrics: Mapping[str, float] = field(default_factory=dict)
    start: AdapterState | None = None
    weight: float = 0.0

    @property
    def trained(self) -> dict[str, Any]:
        """Start + delta in float64: what the client ended with, for the sent tensors."""
        assert self.start is not None
        start = self.start.tensors
        return {k: start[k].double() + v.double() for k, v in self.delta.tensors.items()}
