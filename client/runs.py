"""Runs: what a client keeps of each run on its disk, and when it lets go of it."""

import os
import shutil
import time
from pathlib import Path

from fedlora.storage import storage_errors

# runs of which everything is kept
KEPT = 4


class Runs:
    """The folders of a client's runs, by lineage id.

    <run>/parts       fetched of broadcasts; can be fetched again
    <run>/clients     what the client remembers from round to round; cannot be had again
    <run>/finished    is there once the update for the last round was made
    <run>/used        its time is that of the last order

    Of all but the newest runs the parts go; so does what is remembered, if the run has finished.
    One that has not may be continued at any time, and its client must not begin anew.

    Args:
        folder: made when it is first needed.
        most: so many newest runs are left alone.
    """

    def __init__(self, folder: Path, most: int = KEPT) -> None:
        self.folder = folder
        self.most = most

    def use(self, run: str) -> Path:
        """The folder of a run, which becomes the newest; older ones are cleared.

        Raises:
            StorageError: the disk refused.
        """
        own = self.folder / run
        with storage_errors(own):
            own.mkdir(parents=True, exist_ok=True, mode=0o700)
            # also after the clock was set back
            now = max([time.time_ns(), *(1 + _used_ns(path) for path in self._all())])
            (own / "used").touch()
            os.utime(own / "used", ns=(now, now))
        for old in sorted(self._all(), key=_used_ns)[: -self.most]:
            _clear(old)
        return own

    def finish(self, run: str) -> None:
        """The update for the last round of the run is made.

        Raises:
            StorageError: the disk refused.
        """
        marker = self.folder / run / "finished"
        with storage_errors(marker):
            marker.touch()

    def _all(self) -> list[Path]:
        return [path for path in self.folder.iterdir() if path.is_dir()]


def _used_ns(run: Path) -> int:
    try:
        return (run / "used").stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def _clear(run: Path) -> None:
    # what cannot be removed now is tried again with the next order
    shutil.rmtree(run / "parts", ignore_errors=True)
    if (run / "finished").exists():
        # the marker after what it speaks of, lest half of that stays for good
        shutil.rmtree(run / "clients", ignore_errors=True)
    if not (run / "clients").exists():
        shutil.rmtree(run, ignore_errors=True)
