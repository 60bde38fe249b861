"""The round loop: attempts at rounds until the last one is committed.

The loop never waits without a bound, never lets one client's reply end a run, and commits
a round whole or not at all. It is the same for every link; what carries the bytes is the
link's business.
"""

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace

import torch

from fedlora.checkpoint import Committed
from fedlora.errors import QuorumFailed, StorageError
from fedlora.seeds import generator
from fedlora.server.handout import Handout
from fedlora.server.merge import Received, Stopwatch, merge
from fedlora.server.run_parts import RoundSettings, RunParts
from fedlora.server.spool import Spool
from fedlora.strategies.base import ClientInfo, StrategyState


def run_rounds(run: RunParts, state: StrategyState, until: int | None = None) -> StrategyState:
    """Runs rounds up to `until` (by default all) and returns the last state.

    Raises:
        QuorumFailed: a round stayed below quorum through all its attempts.
        StrategyError: the strategy failed; the last committed round stands.
        StorageError: the disk refused; likewise.
    """
    rounds = run.settings.rounds
    last = rounds if until is None else min(until, rounds)
    while state.round < last:
        state = _run_round(run, state)
    return state


def _run_round(run: RunParts, state: StrategyState) -> StrategyState:
    number, retries = state.round + 1, run.settings.retries
    first = run.store.first_attempt(number)
    shortage = ""
    for count in range(first, first + retries + 1):
        spool = Spool(run.store.folder / "spool.bin")
        timed = Stopwatch()
        try:
            handout = Handout(run, state, count, spool)
            if not (shortage := _collect(handout, timed)):
                return merge(run, state, _received(handout), timed)
            for line in handout.rejected:
                run.emit(line)
            event = {"event": "abandoned", "round": number, "attempt": count, "why": shortage}
            run.emit(event)
        finally:
            spool.close()
    # what clients sent for these attempts, and keep, is not asked for again
    with suppress(StorageError):
        run.store.give_up(number, first + retries + 1)
    raise QuorumFailed(
        f"round {number} failed after {retries + 1} attempts: {shortage}; the run stands at "
        f"round {state.round}. Bring clients back, then: fedlora "
        f"resume {run.store.folder}"
    )


def _collect(handout: Handout, timed: Stopwatch) -> str:
    """Hands out work and admits what comes back; says what is missing for a quorum."""
    run = handout.run
    with timed("broadcast"):
        roster = list(run.link.roster())
        chosen = _choose(run.settings, roster, handout.round, handout.attempt)
        quorum = run.settings.quorum or max(run.settings.least, math.ceil(2 * len(chosen) / 3))
        if len(chosen) < quorum:
            # nobody works for a round that cannot be
            return f"{len(chosen)} clients are there; the quorum is {quorum}"
        tasks, parts = handout.tasks(chosen)
    with timed("clients"):
        for reply in run.link.exchange(tasks, parts, run.settings.deadline_s):
            handout.admit(reply)
    # in whatever order replies came, the record of the round is the same
    handout.rejected.sort(key=lambda event: str(event["client"]))
    if len(handout.updates) >= quorum:
        return ""
    why = ""
    if handout.rejected:
        first = handout.rejected[0]
        why = f", {len(handout.rejected)} rejected ({first['client']}: {first['detail'][:200]})"
    return (
        f"{len(handout.updates)} of {len(chosen)} clients gave a usable update{why}; "
        f"the quorum is {quorum}"
    )


def _choose(
    settings: RoundSettings, roster: Sequence[ClientInfo], number: int, attempt: int
) -> list[ClientInfo]:
    wanted = settings.clients_per_round or len(roster)
    if wanted >= len(roster):
        return list(roster)
    stream = generator(settings.seed, "clients", number, attempt)
    picks = torch.randperm(len(roster), generator=stream)[:wanted].tolist()
    return [roster[i] for i in sorted(picks)]


def _received(handout: Handout) -> Received:
    rejected = {event["client"] for event in handout.rejected}
    return Received(
        updates=[handout.read(name) for name in handout.spool.clients()],
        rejected=handout.rejected,
        missing=sorted(handout.expected.keys() - handout.updates.keys() - rejected),
        bytes_up=handout.bytes_up,
        bytes_down=handout.bytes_down,
        attempt=handout.attempt,
    )


def resume_state(committed: Committed, initial: StrategyState) -> StrategyState:
    """The strategy's state in a committed round."""
    extra = committed.record.get("extra", {})
    return replace(
        initial, round=committed.round, tensors=dict(committed.tensors), extra=dict(extra)
    )
