"""Keeper: sees to it that every run of a server is worked on until it has ended.

Flower notices that a ServerApp died after a minute, and never starts it again. A ServerApp of
ours holds a lock on its run; one that is gone is seen at once, and its run is given to a new
one, which goes on from the last committed round.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from fedlora.errors import EXIT_FAILED, RunFailed
from fedlora.server.control import FlowerControl
from fedlora.server.home import Home, Outcome, Place
from fedlora.server.journal import Journal

log = logging.getLogger(__name__)

# a ServerApp that has not taken its run by then never will
START_S = 120.0
# ServerApps in a row that died without committing a round
MOST_DEATHS = 6
# whoever ends or continues a run writes its outcome and its journal within that time
TELL_S = 10.0


@dataclass
class _Watch:
    """What is known of one run.

    Attributes:
        flower_run: Flower's id; 0 when no ServerApp was asked for.
        since: when it was asked for.
        taken: the ServerApp has taken the run.
        deaths: ServerApps that died since a round was last committed.
        head: what the run's HEAD held then.
        silent_since: when the run was found ended with a journal that does not say so.
        told: the journal of the ended run says so.
    """

    flower_run: int = 0
    since: float = 0.0
    taken: bool = False
    deaths: int = 0
    head: bytes = b""
    silent_since: float | None = None
    told: bool = False


class Keeper:
    """Keeps the runs of one server going.

    Args:
        home: the server's folder.
        control: its SuperLink.
        clock: seconds, monotonic.
    """

    def __init__(
        self, home: Home, control: FlowerControl, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.home = home
        self.control = control
        self.clock = clock
        self._watches: dict[str, _Watch] = {}

    def tend(self) -> None:
        """Looks at every run once; never waits.

        Raises:
            StorageError: the disk refused.
        """
        for place in self.home.places():
            watch = self._watches.setdefault(place.run, _Watch())
            outcome = place.outcome()
            if outcome is None:
                watch.silent_since, watch.told = None, False
                self._tend(place, watch)
            else:
                if watch.flower_run:
                    self._stop(watch)
                if not watch.told:
                    self._tell(place, watch, outcome)

    def _tend(self, place: Place, watch: _Watch) -> None:
        now = self.clock()
        if place.is_worked_on():
            watch.taken = True
            return
        if watch.flower_run:
            if not watch.taken and now - watch.since < START_S:
                return
            head = _head(place)
            watch.deaths = watch.deaths + 1 if head == watch.head else 1
            watch.head = head
            log.warning(
                "the ServerApp of run %s is gone; starting another",
                place.run,
                extra={"run": place.run},
            )
            self._stop(watch)
        if watch.deaths >= MOST_DEATHS:
            why = (
                f"{watch.deaths} ServerApps in a row died without committing a round; their output "
                f"is in {self.home.folder / 'logs'}. Continue the run with: fedlora resume"
            )
            Journal(place.events).append({"event": "failed", "exit_code": EXIT_FAILED, "why": why})
            place.end(Outcome("failed", EXIT_FAILED, why))
            return
        try:
            watch.flower_run = self.control.start_run(place.run)
        except RunFailed as e:
            # the SuperLink may be on its way up; tried again at the next look
            log.info("%s", e, extra={"run": place.run})
            return
        watch.since, watch.taken = now, False
        log.info("asked for a ServerApp for run %s", place.run, extra={"run": place.run})

    def _tell(self, place: Place, watch: _Watch, outcome: Outcome) -> None:
        """Ends the journal of an ended run, whose ServerApp may have died before it did so."""
        if place.is_worked_on():
            return
        journal = Journal(place.events)
        events = journal.read()
        now = self.clock()
        if any(event["event"] in ("end", "failed") for event in events):
            watch.told = True
        elif watch.silent_since is None:
            watch.silent_since = now
        elif now - watch.silent_since >= TELL_S:
            log.warning("run %s ended without a word", place.run, extra={"run": place.run})
            if outcome.state == "finished":
                rounds = [event["round"] for event in events if event["event"] == "round"]
                journal.append({"event": "end", "round": max(rounds, default=0)})
            else:
                journal.append(
                    {"event": "failed", "exit_code": outcome.exit_code, "why": outcome.detail}
                )

    def _stop(self, watch: _Watch) -> None:
        try:
            self.control.stop_run(watch.flower_run)
        except RunFailed as e:
            log.info("%s", e)
        watch.flower_run, watch.taken = 0, False


def _head(place: Place) -> bytes:
    try:
        return (place.folder / "HEAD").read_bytes()
    except OSError:
        return b""
