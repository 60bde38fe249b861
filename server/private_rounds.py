"""Rounds that are private to whole clients: all that leaves one is its noisy mean update.

What clients send is clipped, summed and noised as soon as it is admitted; strategy, record,
events and report see one update, the noisy mean, and what they make of it costs nothing.

A round is paid for before anybody is chosen, and has no quorum of replies: a round that were
tried again until enough clients answer would choose each client more often than the sampling
rate says. `federation.quorum` counts clients that are connected before the choice. A round
that nobody is chosen for, or in which nobody answers, commits noise.

Who took part stays at the server, for a client that is known to be in a round gains nothing
from its being one of many: events name no clients, count no rejections and no bytes.
"""

import logging
import math
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from fedlora.adapter import AdapterState, tensors_digest
from fedlora.errors import BudgetExhausted, QuorumFailed, StrategyError
from fedlora.messages import CONTROL, ClientUpdate
from fedlora.privacy.accounting import Event as Spent
from fedlora.privacy.accounting import epsilon, noise_for
from fedlora.privacy.central import AdaptiveClip, Release, clipped_sum
from fedlora.privacy.client_level import Terms
from fedlora.privacy.ledger import Ledger
from fedlora.privacy.ledger import Release as Entry
from fedlora.privacy.noise import noise_source
from fedlora.seeds import generator
from fedlora.server.admission import Expectation
from fedlora.server.handout import Handout
from fedlora.server.merge import Received, Stopwatch, merge
from fedlora.server.run_parts import RunParts
from fedlora.server.selection import choose
from fedlora.server.spool import Spool
from fedlora.strategies.base import ClientInfo, StrategyState
from fedlora.wire import decode_own, encode_tensors

log = logging.getLogger(__name__)
# name that the noisy mean goes by where an update has its client's
EVERYBODY = "everybody"
WITHIN = "within"


@dataclass(frozen=True)
class Frame:
    """What every client of a round is asked for, whoever they are.

    Attributes:
        expected: the reply of one of them.
        clip: S of the round.
    """

    expected: Expectation
    clip: float


class PrivateRounds:
    """Does the rounds of a run whose terms protect clients.

    Args:
        run: the run.
        terms: what is promised.
        ledger: what was spent, by this run alone.
    """

    def __init__(self, run: RunParts, terms: Terms, ledger: Ledger) -> None:
        self.run = run
        self.terms = terms
        self.ledger = ledger

    def round(self, state: StrategyState) -> StrategyState:
        """The next round; returns its state once it is committed.

        Raises:
            BudgetExhausted: it does not fit into what is left of the budget.
            QuorumFailed: too few clients are connected, also after the retries.
            StrategyError: the strategy failed, or asks clients for different things.
            StorageError: the disk refused.
        """
        timed = Stopwatch()
        with self._spool() as spool:
            frame = self._frame(state, spool)
            entry = Entry(self.run.run, state.round + 1, 0, frame.expected.start_sha256)
            # a crash between release and commit: the same bytes again cost nothing
            payload = self.ledger.cached(entry)
            resent = payload is not None
            if payload is None:
                payload = self._released(state, frame, entry, timed)
        release = _decoded(payload)
        new = merge(self.run, state, self._received(frame, release, resent=resent), timed)
        return new
