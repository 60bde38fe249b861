"""The round loop: attempts at rounds until the last one is committed.

The loop never waits without a bound, never lets one client's reply end a run, and commits
a round whole or not at all. It is the same for every link; what carries the bytes is the
link's business.
"""

from dataclasses import replace

from fedlora.checkpoint import Committed
from fedlora.errors import QuorumFailed
from fedlora.server.attempt import Attempt, RunParts
from fedlora.server.spool import Spool
from fedlora.strategies.base import StrategyState


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
    shortage = ""
    for count in range(retries + 1):
        spool = Spool(run.store.folder / "spool.bin")
        try:
            attempt = Attempt(run, state, count, spool)
            if not (shortage := attempt.collect()):
                return attempt.commit(*attempt.merge())
            for line in attempt.rejected:
                run.emit(line)
            event = {"event": "abandoned", "round": number, "attempt": count, "why": shortage}
            run.emit(event)
        finally:
            spool.close()
    raise QuorumFailed(
        f"round {number} failed after {retries + 1} attempts: {shortage}; the run stands at "
        f"round {state.round}. Bring clients back, then: fedlora "
        f"resume {run.store.folder}"
    )


def resume_state(committed: Committed, initial: StrategyState) -> StrategyState:
    """The strategy's state in a committed round."""
    extra = committed.record.get("extra", {})
    return replace(
        initial, round=committed.round, tensors=dict(committed.tensors), extra=dict(extra)
    )
