"""What server and clients say to each other.

A message is a small JSON manifest and a canonical safetensors payload. The manifest is
checked first and says what the payload must be, byte for byte (`fedlora.wire`).
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from fedlora.adapter import AdapterState, LayerSpec, Tensors

OptimizerState = Literal["reset", "keep"]
Pair = tuple[Tensor, Tensor]
Scheme = Literal["none", "bf16", "int8", "int4"]

HEADS = "heads"
CONTROL = "control."


@dataclass(frozen=True)
class Coding:
    """How tensors travel, see `fedlora.compress`.

    Attributes:
        scheme: number format; "none" is float32.
        top_k: part of each tensor's entries that travels, the largest ones; the others are
            zero for the receiver.
    """

    scheme: Scheme = "none"
    top_k: float = 1.0

    @property
    def plain(self) -> bool:
        """Tensors travel as they are."""
        return self == PLAIN


PLAIN = Coding()


@dataclass(frozen=True)
class Compression:
    """What a run codes.

    Attributes:
        up: updates.
        down: adapters that are handed out.
        feedback: clients add to an update what coding took from their earlier ones.
    """

    up: Coding = PLAIN
    down: Coding = PLAIN
    feedback: bool = True

    @property
    def plain(self) -> bool:
        """Everything travels as it is."""
        return self.up.plain and self.down.plain


UNCOMPRESSED = Compression()


@dataclass(frozen=True)
class RoundPlan:
    """What one client does in one round.

    Attributes:
        run: lineage id of the run, the same across resumes.
        round: 1-based.
        attempt: 0-based; a round below quorum is tried again with the next number.
        client: name of the client the plan is for.
        factors: names of the factors that are trained; the others stay frozen.
        rank: rank of the adapter this client holds.
        local_steps: optimiser steps.
        optimizer_state: "keep" continues the client's own moments of its last round.
        kept: factors (and "heads") that stay at the client: it starts from its own, if it
            has any, and never sends them.
        fresh: seed from which the client can draw the starting factors itself; None when
            they must be fetched.
        rates: factor -> multiplier of the learning rate.
        proximal: weight mu of the penalty mu/2 ||theta - start||^2; 0 for none.
        proximal_product: the penalty is taken on the weight change instead of the factors.
        control: the client corrects its gradients by control variates and sends their change.
        tail_slot: first rank slot of the tail whose norm product is penalised.
        tail_weight: weight of that penalty; 0 for none.
        slots: rank slots the client may train, over all layers; 0 for all.
        trial_steps: optimiser steps of the trial that chooses the slots; 0 for one epoch.
        up, top_k: how the update is coded; see `Coding`.
        down: how the starting adapter is coded.
        feedback: the client adds what coding took from its earlier updates.
    """

    run: str
    round: int
    attempt: int
    client: str
    factors: tuple[str, ...]
    rank: int
    local_steps: int
    optimizer_state: OptimizerState = "reset"
    kept: tuple[str, ...] = ()
    fresh: int | None = None
    rates: Mapping[str, float] = field(default_factory=dict)
    proximal: float = 0.0
    proximal_product: bool = False
    control: bool = False
    tail_slot: int = 0
    tail_weight: float = 0.0
    slots: int = 0
    trial_steps: int = 0
    up: Scheme = "none"
    top_k: float = 1.0
    down: Scheme = "none"
    feedback: bool = False

    @property
    def coding(self) -> Coding:
        """How the update is coded."""
        return Coding(self.up, self.top_k)

    @property
    def sent(self) -> tuple[str, ...]:
        """Factors that are trained and sent."""
        return tuple(name for name in self.factors if name not in self.kept)


def part_coding(part: str, down: Coding) -> Coding:
    """How one part of a broadcast is coded.

    The basis and the folds travel as they are: they change the base for good, and so would
    their rounding.
    """
    return down if part in (HEADS, "control") or part.startswith("factor.") else PLAIN


@dataclass(frozen=True)
class Start:
    """What a client starts a round from.

    Attributes:
        adapter: the starting adapter.
        fold: version -> (layer + ".L" (d, rho), layer + ".Q" (rho, k)): frozen low-rank
            changes of the base weight, W0 + sum L Q; each version is sent once.
        control: the server's control variates, by tensor name.
    """

    adapter: AdapterState
    fold: Mapping[str, Tensors] = field(default_factory=dict)
    control: Tensors = field(default_factory=dict)


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
        fold_ranks: version of a fold -> its rank per layer, in the order of the spec.
    """

    plan: RoundPlan
    spec_digest: str
    parts: Mapping[str, str]
    fold_ranks: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def start_sha256(self) -> str:
        """Names the starting adapter as a whole; the client's update must quote it."""
        text = "".join(f"{name}:{digest};" for name, digest in sorted(self.parts.items()))
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class PrivacyStatement:
    """What a client says of the privacy of an update, by its own ledger.

    Attributes:
        unit: of which data one unit more or less can hardly be told: "record".
        epsilon, delta: spent in this run, this update included; epsilon is None when the noise
            can be drawn again by others, so that nothing is private.
        noise_multiplier: standard deviation of the noise in units of `clip`.
        clip: L2 norm that one unit's share is clipped to.
        steps: noisy steps in this run so far.
        accountant: what epsilon was computed by, "prv" or "rdp".
        noise: source of the noise: "os", "secure" or "test".
        entry: number of the last entry in the client's ledger.
        head: digest of that entry, which seals all before it.
    """

    unit: str
    epsilon: float | None
    delta: float
    noise_multiplier: float
    clip: float
    steps: int
    accountant: str
    noise: str
    entry: int
    head: str


class LazyTensors(Mapping[str, Tensor]):
    """Named tensors that are made, or read from disk, each time they are asked for.

    Args:
        names: the names.
        read: name -> tensor.
    """

    def __init__(self, names: Iterable[str], read: Callable[[str], Tensor]) -> None:
        self._names = dict.fromkeys(names)
        self._read = read

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._read(name)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


@dataclass(frozen=True)
class ClientUpdate:
    """Client to server: trained minus broadcast, for the planned factors only.

    On the server, the tensors are read from disk each time they are asked for, so that a
    strategy that goes layer by layer holds little memory.

    Attributes:
        run, round, attempt, client: copied from the plan.
        start_sha256: digest of the broadcast payload that was trained on.
        delta: the change of every sent factor and head parameter.
        num_examples: examples the client trains on; its weight in the average.
        metrics: plain numbers about the client's own training and validation.
        control: change of the client's control variates, by tensor name.
        slots: per layer of the spec, the trained rank slots as a bit mask; None for all.
        coding: how the tensors are to be coded; those of an admitted update are decoded.
        privacy: what it reveals of the client's data; None when nothing was done about that.
        start: what the client started from; attached on arrival, never sent.
        weight: its weight in the average, not normalised; attached on arrival.
        products: layer -> (L (d, R), Q (R, k)), attached by wrappers that act on the weight
            change itself; None when it is the product of the trained factors.
    """

    run: str
    round: int
    attempt: int
    client: str
    start_sha256: str
    delta: AdapterState
    num_examples: float
    metrics: Mapping[str, float] = field(default_factory=dict)
    control: Tensors = field(default_factory=dict)
    slots: tuple[int, ...] | None = None
    coding: Coding = PLAIN
    privacy: PrivacyStatement | None = None
    start: AdapterState | None = None
    weight: float = 0.0
    products: Callable[[LayerSpec], Pair] | None = None

    @property
    def trained(self) -> Mapping[str, Tensor]:
        """Start + delta in float64: what the client ended with, for the sent tensors."""
        start, delta = self.begin.tensors, self.delta.tensors
        return LazyTensors(delta, lambda name: start[name].double() + delta[name].double())

    @property
    def ended(self) -> Mapping[str, Tensor]:
        """All tensors the client ended with, float64: the trained ones and the frozen ones."""
        start, trained = self.begin.tensors, self.trained
        return LazyTensors(
            start, lambda name: trained[name] if name in trained else start[name].double()
        )

    @property
    def begin(self) -> AdapterState:
        """The starting adapter, once it is attached."""
        assert self.start is not None, "the start is attached on arrival"
        return self.start
