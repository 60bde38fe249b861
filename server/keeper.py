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


@dataclass
class _Watch:
    """What is known of one run.

    Attributes:
        flower_run: Flower's id; 0 when no ServerApp was asked for.
        since: when it was asked for.
        taken: the ServerApp has taken the run.
        deaths: ServerApps that died since a round was last committed.
        head: what the run's HEAD held then.
    """

    flower_run: int = 0
    since: float = 0.0
    taken: bool = False
    deaths: int = 0
    head: bytes = b""


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
            if place.outcome() is None:
                self._tend(place, watch)
            elif watch.flower_run:
                self._stop(watch)

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
