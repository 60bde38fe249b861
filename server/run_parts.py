"""What the rounds of a run work with: settings from the job, and the parts of the run."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from fedlora.adapter import AdapterState
from fedlora.adapters.base import Basis, Method
from fedlora.checkpoint import RunStore
from fedlora.messages import UNCOMPRESSED, Compression, OptimizerState
from fedlora.server.admission import Limits
from fedlora.server.journal import Event
from fedlora.server.link import Link, SecureLink
from fedlora.server.privacy_record import PrivacyRecord
from fedlora.strategies.base import Strategy, StrategyState

Evaluate = Callable[[StrategyState, AdapterState], Mapping[str, float]]


@dataclass(frozen=True)
class RoundSettings:
    """What the job says about rounds.

    Attributes:
        rounds: rounds of the whole run.
        clients_per_round: None takes everybody.
        quorum: fewest admitted updates; None is two thirds of those chosen, rounded up.
        deadline_s: seconds after which a round closes.
        retries: further attempts of a round below quorum.
        local_steps: optimiser steps per client.
        evaluate_every: rounds between evaluations.
        keep_rounds, keep_every: which old rounds keep their tensors.
        compression: how tensors travel.
        least: quorum that holds for a None, however few were chosen.
        secure_bits: size of masked integers; with `RunParts.secure` alone.
    """

    seed: int
    rounds: int
    clients_per_round: int | None
    quorum: int | None
    deadline_s: float
    retries: int
    local_steps: int
    optimizer_state: OptimizerState
    evaluate_every: int
    keep_rounds: int
    keep_every: int
    limits: Limits
    compression: Compression = UNCOMPRESSED
    least: int = 1
    secure_bits: int = 64


@dataclass(frozen=True)
class RunParts:
    """What every attempt of a run works with.

    Attributes:
        run: lineage id of the run.
        store: where rounds are committed.
        link: the clients.
        job_sha256: digest of the job, to which secure sums are bound.
        secure: the clients again, for secure aggregation; None when updates come as they are.
        strategy: how updates are merged.
        method, basis: of the adapter.
        sent_basis: the basis again if clients cannot make it themselves; each gets it once.
        evaluate: measures a state and its global adapter; None where the server has no data.
        emit: receives every event of the run.
        privacy: what was spent of it, up to the last committed round.
    """

    run: str
    store: RunStore
    link: Link
    strategy: Strategy
    method: Method
    basis: Basis
    sent_basis: Basis
    settings: RoundSettings
    evaluate: Evaluate | None
    emit: Callable[[Event], None]
    privacy: PrivacyRecord = field(default_factory=PrivacyRecord)
    secure: SecureLink | None = None
    job_sha256: str = ""
