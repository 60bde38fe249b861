"""Rounds that are private to whole clients: all that leaves one is its noisy mean update.

What clients send is clipped, summed and noised as soon as it is admitted; strategy, record,
events and report see one update, the noisy mean, and what they make of it costs nothing.

A round is paid for before anybody is chosen, and has no quorum of replies: a round that is
tried again until enough clients answer takes each of them more often than the sampling rate
says. `federation.quorum` counts clients that are connected before the choice. A round that
nobody is chosen for, or in which nobody answers, commits noise.

Who took part stays at the server, for a client that is known to be in a round gains nothing
from being one of many: events name no clients and count no rejections, and their bytes are
those of as many clients as are expected in a round.
"""

import logging
import math
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedlora.adapter import AdapterState
from fedlora.errors import QuorumFailed, StrategyError
from fedlora.messages import CONTROL, ClientUpdate
from fedlora.privacy.accounting import Event as Spent
from fedlora.privacy.accounting import epsilon, noise_for
from fedlora.privacy.central import AdaptiveClip
from fedlora.privacy.client_level import ACCOUNTANT
from fedlora.privacy.ledger import Ledger
from fedlora.privacy.ledger import Release as Entry
from fedlora.seeds import generator
from fedlora.server.admission import Expectation
from fedlora.server.central_record import CentralRecord
from fedlora.server.handout import Handout
from fedlora.server.merge import Received, Stopwatch, merge
from fedlora.server.run_parts import RunParts
from fedlora.server.selection import choose
from fedlora.server.spool import Spool
from fedlora.strategies.base import ClientInfo, StrategyState
from fedlora.wire import decode_own, encode_tensors

log = logging.getLogger(__name__)
# stands where an update has the name of its client
EVERYBODY = "everybody"
FACTS = "privacy.facts"


@dataclass(frozen=True)
class Frame:
    """What is known of a round before anybody is chosen.

    Attributes:
        asked: the reply that every client is asked for.
        bytes_down: that a client fetches which holds nothing yet.
    """

    asked: Expectation
    bytes_down: int


@dataclass(frozen=True)
class Given:
    """What a round gives away, as the ledger keeps it.

    Attributes:
        mean: name -> noisy mean update, float32.
        clip: S.
        noise_multiplier: z.
        within: noisy fraction of updates that were not clipped; NaN where S is fixed.
    """

    mean: Mapping[str, Tensor]
    clip: float
    noise_multiplier: float
    within: float

    def to_bytes(self) -> bytes:
        """The payload of a release."""
        facts = torch.tensor([self.clip, self.noise_multiplier, self.within], dtype=torch.float64)
        return encode_tensors({**self.mean, FACTS: facts})

    @classmethod
    def from_bytes(cls, payload: bytes) -> "Given":
        """What `to_bytes` made."""
        tensors = decode_own(payload)
        clip, noise_multiplier, within = tensors.pop(FACTS).tolist()
        return cls(tensors, clip, noise_multiplier, within)


class PrivateRounds:
    """Does the rounds of a run whose terms protect clients.

    Args:
        run: the run.
        record: the run's, with its terms.
        ledger: what this run has spent.
    """

    def __init__(self, run: RunParts, record: CentralRecord, ledger: Ledger) -> None:
        self.run = run
        self.record = record
        self.terms = record.terms
        self.ledger = ledger

    def round(self, state: StrategyState) -> StrategyState:
        """Does, commits and reports the next round; returns its state.

        Raises:
            BudgetExhausted: it does not fit into what is left of the budget.
            QuorumFailed: too few clients are connected, also after the retries.
            StrategyError: the strategy failed, or asks clients for different things.
            StorageError: the disk refused.
        """
        timed = Stopwatch()
        spool = Spool(self.run.store.folder / "spool.bin")
        try:
            frame = self._frame(state, spool)
            # released before a crash, and not committed: the same bytes again cost nothing
            payload = self.ledger.cached(self._entry(frame, 0))
            if payload is None:
                payload = self._release(state, frame, spool, timed)
        finally:
            spool.close()
        given = Given.from_bytes(payload)
        self._note(given)
        received = self._received(frame, given)
        new = merge(self.run, state, received, timed)
        self.ledger.released(self._entry(frame, 0))
        return new

    def _frame(self, state: StrategyState, spool: Spool) -> Frame:
        handout = Handout(self.run, state, 0, spool)
        (task,), parts = handout.tasks([ClientInfo(EVERYBODY, state.spec.rank)])
        asked = handout.expected[EVERYBODY]
        if any(name.startswith(CONTROL) for name in asked.shapes):
            raise StrategyError(
                "clients send control variates, which are kept one by one: nothing hides a "
                'client there; leave them out with privacy.unit = "client"'
            )
        down = len(task.manifest) + sum(len(part) for part in parts.values())
        return Frame(asked, down)

    def _release(self, state: StrategyState, frame: Frame, spool: Spool, timed: Stopwatch) -> bytes:
        """Pays for the round, does it, and writes down what it gives away."""
        attempt, roster = self._present(state)
        entry = self._entry(frame, attempt)
        clip, noise_multiplier = self.record.next_clip, self._noise_multiplier(state)
        event = self.terms.event(noise_multiplier)
        self.ledger.reserve(entry, [event])
        handout = Handout(self.run, state, attempt, spool)
        with timed("broadcast"):
            tasks, parts = handout.tasks(self._chosen(roster, handout))
        for name, asked in handout.expected.items():
            alike = (asked.start_sha256, asked.shapes) == (
                frame.asked.start_sha256,
                frame.asked.shapes,
            )
            if not alike:
                raise StrategyError(
                    f"client {name} is asked for something else than the others, so that their "
                    'updates cannot be summed; privacy.unit = "client" needs one start for all'
                )
        with timed("clients"):
            for reply in self.run.link.exchange(tasks, parts, self.run.settings.deadline_s):
                handout.admit(reply)
        for line in handout.rejected:
            log.warning(
                "update of %s rejected (%s): %s", line["client"], line["code"], line["detail"]
            )
        with timed("reduce"):
            updates = (handout.read(name).delta.tensors for name in spool.clients())
            source = self.terms.source(self.run.settings.seed)
            mechanism = self.terms.mechanism(source, noise_multiplier)
            release = mechanism.round(handout.round, updates, frame.asked.shapes, clip)
            mean = {name: tensor.float() for name, tensor in release.mean.items()}
            within = math.nan if release.within is None else release.within
            payload = Given(mean, clip, noise_multiplier, within).to_bytes()
        self.ledger.spend(entry, [event], payload)
        return payload

    def _noise_multiplier(self, state: StrategyState) -> float:
        """Z of the last round; more where what a crash lost must be made up for."""
        terms, found = self.terms, self.record.noise_multiplier
        if not terms.solved or terms.epsilon is None:
            return found
        rest, spent = terms.rounds - state.round, self.ledger.charged()
        if epsilon([*spent, Spent(terms.rate, found, rest)], terms.delta) <= terms.epsilon:
            return found
        return noise_for(terms.epsilon, terms.delta, terms.rate, rest, spent)

    def _present(self, state: StrategyState) -> tuple[int, Sequence[ClientInfo]]:
        """Number of the attempt, and the clients that are connected in it."""
        settings = self.run.settings
        least, number = settings.quorum or 1, state.round + 1
        for attempt in range(settings.retries + 1):
            roster = list(self.run.link.roster())
            if len(roster) >= least:
                return attempt, roster
            why = f"{len(roster)} clients are connected; the quorum is {least}"
            self.run.emit({"event": "abandoned", "round": number, "attempt": attempt, "why": why})
        raise QuorumFailed(
            f"round {number} failed after {settings.retries + 1} attempts: {why}; the run stands "
            f"at round {state.round}. Bring clients back, then: fedlora resume "
            f"{self.run.store.folder}"
        )

    def _chosen(self, roster: Sequence[ClientInfo], handout: Handout) -> list[ClientInfo]:
        settings = self.run.settings
        if self.terms.sampling == "fixed":
            return choose(
                roster, self.terms.per_round, settings.seed, handout.round, handout.attempt
            )
        if self.terms.private:
            draw = secrets.SystemRandom().random
            return [client for client in roster if draw() < self.terms.rate]
        stream = generator(settings.seed, "clients", handout.round, handout.attempt)
        coins = torch.rand(len(roster), generator=stream, dtype=torch.float64).tolist()
        return [
            client for client, coin in zip(roster, coins, strict=True) if coin < self.terms.rate
        ]

    def _entry(self, frame: Frame, attempt: int) -> Entry:
        asked = frame.asked
        return Entry(self.run.run, asked.round, attempt, asked.start_sha256)

    def _note(self, given: Given) -> None:
        next_clip = given.clip
        if self.terms.adaptive:
            next_clip = AdaptiveClip().next_clip(given.clip, given.within)
        # what a known seed drew hides nothing
        spent = self.ledger.epsilon(accountant=ACCOUNTANT) if self.terms.private else None
        self.record.note(
            clip=given.clip,
            noise_multiplier=given.noise_multiplier,
            next_clip=next_clip,
            steps=sum(event.steps for event in self.ledger.charged()),
            epsilon=spent,
        )

    def _received(self, frame: Frame, given: Given) -> Received:
        """The noisy mean as the one update of the round, and a record that names nobody."""
        asked = frame.asked
        mean = ClientUpdate(
            run=asked.run,
            round=asked.round,
            attempt=asked.attempt,
            client=EVERYBODY,
            start_sha256=asked.start_sha256,
            delta=AdapterState(asked.spec, given.mean),
            num_examples=1.0,
            start=asked.start,
            weight=1.0,
        )
        return Received(
            updates=[mean],
            rejected=[],
            missing=[],
            bytes_up=self.terms.per_round * asked.size_bytes,
            bytes_down=self.terms.per_round * frame.bytes_down,
            event={"clients": [], "rejected": None},
            record={"client_metrics": {}, "weights": {}},
            comparable=False,
        )
