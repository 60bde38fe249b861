"""The round loop: attempts at rounds until the last one is committed.

The loop never waits without a bound, never lets one client's reply end a run, and commits
a round whole or not at all. It is the same for every link; what carries the bytes is the
link's business.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from fedlora.checkpoint import Committed
from fedlora.errors import BudgetExhausted, QuorumFailed, SecureAggregationError
from fedlora.server.handout import Handout
from fedlora.server.link import BUDGET_EXHAUSTED
from fedlora.server.merge import Received, Stopwatch, merge
from fedlora.server.run_parts import RunParts
from fedlora.server.secure_round import SecureRound
from fedlora.server.selection import choose
from fedlora.server.spool import Spool
from fedlora.strategies.base import StrategyState


def run_rounds(
    run: RunParts,
    state: StrategyState,
    until: int | None = None,
    one_round: Callable[[StrategyState], StrategyState] | None = None,
) -> StrategyState:
    """Runs rounds up to `until` (by default all) and returns the last state.

    Args:
        one_round: does and commits the round after a state, in a way of its own.

    Raises:
        QuorumFailed: a round stayed below quorum through all its attempts.
        StrategyError: the strategy failed; the last committed round stands.
        StorageError: the disk refused; likewise.
    """
    rounds = run.settings.rounds
    last = rounds if until is None else min(until, rounds)
    one_round = one_round or partial(_run_round, run)
    while state.round < last:
        state = one_round(state)
    return state


def _run_round(run: RunParts, state: StrategyState) -> StrategyState:
    number, retries = state.round + 1, run.settings.retries
    shortage = ""
    for count in range(retries + 1):
        spool = Spool(run.store.folder / "spool.bin")
        timed = Stopwatch()
        try:
            handout = Handout(run, state, count, spool)
            received, shortage = _collect(handout, timed)
            if received is not None:
                return merge(run, state, received, timed)
            for line in handout.rejected:
                run.emit(line)
            event = {"event": "abandoned", "round": number, "attempt": count, "why": shortage}
            run.emit(event)
            _stop_if_exhausted(handout, shortage)
        finally:
            spool.close()
    raise QuorumFailed(
        f"round {number} failed after {retries + 1} attempts: {shortage}; the run stands at "
        f"round {state.round}. Bring clients back, then: fedlora "
        f"resume {run.store.folder}"
    )


def _collect(handout: Handout, timed: Stopwatch) -> tuple[Received | None, str]:
    """Hands out work and admits what comes back, or says what is missing for a quorum."""
    run = handout.run
    with timed("broadcast"):
        roster = list(run.link.roster())
        wanted, seed = run.settings.clients_per_round, run.settings.seed
        chosen = choose(roster, wanted, seed, handout.round, handout.attempt)
        tasks, parts = handout.tasks(chosen)
    quorum = run.settings.quorum or max(run.settings.least, math.ceil(2 * len(chosen) / 3))
    if run.secure is not None:
        with timed("clients"):
            try:
                return SecureRound(handout, run.secure, quorum).gather(tasks, parts), ""
            except SecureAggregationError as e:
                return None, str(e)
    with timed("clients"):
        for reply in run.link.exchange(tasks, parts, run.settings.deadline_s):
            handout.admit(reply)
    # in whatever order replies came, the record of the round is the same
    handout.rejected.sort(key=lambda event: str(event["client"]))
    if len(handout.updates) >= max(1, quorum):
        return _received(handout), ""
    why = ""
    if handout.rejected:
        first = handout.rejected[0]
        why = f", {len(handout.rejected)} rejected ({first['client']}: {first['detail'][:200]})"
    return None, (
        f"{len(handout.updates)} of {len(chosen)} clients gave a usable update{why}; "
        f"the quorum is {quorum}"
    )


def _stop_if_exhausted(handout: Handout, shortage: str) -> None:
    """Trying again would not help clients that may not take part any more."""
    spent = [event for event in handout.rejected if event["code"] == BUDGET_EXHAUSTED]
    if spent:
        raise BudgetExhausted(
            f"round {handout.round} has no quorum because privacy budgets are spent: {shortage}. "
            f"{spent[0]['client']}: {spent[0]['detail']} The run stands at round "
            f"{handout.round - 1}"
        )


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
