"""Child processes that are started again when they die, and all end when their parent does."""

import ctypes
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from fedlora.health import Part

log = logging.getLogger(__name__)

# seconds before a child that died is started again: doubled each time, up to the last
FIRST_WAIT_S, LONGEST_WAIT_S = 0.25, 15.0
# a child that lived so long has started well, and its next death counts as the first
HEALTHY_S = 20.0
# seconds a child has to end by itself
GRACE_S = 5.0

# what a child prints is kept up to this, and as much again of what came before
MAX_OUTPUT_BYTES = 8 * 2**20
TAIL_BYTES = 8192

PR_SET_PDEATHSIG = 1


class Child:
    """One process of a supervisor.

    Args:
        name: for logs.
        command: program and arguments.
        output: file that takes what it prints; what is older is in `<output>.1`.
        most_output: bytes after which it is emptied.
        environment: variables besides the supervisor's own.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        output: Path,
        environment: Mapping[str, str] | None = None,
        most_output: int = MAX_OUTPUT_BYTES,
    ) -> None:
        self.name = name
        self.command = list(command)
        self.output = output
        self.environment = dict(environment or {})
        self.most_output = most_output
        self.starts = 0
        self.since: float | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._started = 0.0
        self._wait = FIRST_WAIT_S
        self._again = 0.0

    @property
    def pid(self) -> int:
        """Process id of the last start; 0 before the first."""
        return self._process.pid if self._process else 0

    @property
    def is_alive(self) -> bool:
        """It runs now."""
        return self._process is not None and self._process.poll() is None

    def part(self) -> Part:
        """How it is, for a health endpoint."""
        return Part(self.name, self.is_alive, self.starts, self.since)

    def start(self) -> None:
        """Starts it, with everything it will start in a process group of its own."""
        self.output.parent.mkdir(parents=True, exist_ok=True)
        with self.output.open("ab") as output:
            self._process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PATH": _path(), **self.environment},
                start_new_session=True,
                preexec_fn=_end_with_parent,
            )
        self.starts += 1
        self.since = time.time()
        self._started = time.monotonic()
        log.info("started %s", self.name, extra={"child": self.name, "pid": self.pid})

    def tend(self) -> bool:
        """Starts it if it is dead and its time has come; says whether it was found dead."""
        self._bound_output()
        if self.is_alive:
            return False
        now = time.monotonic()
        died = self._process is not None and not self._again
        if died:
            assert self._process is not None
            if now - self._started > HEALTHY_S:
                self._wait = FIRST_WAIT_S
            self._again = now + self._wait
            self._wait = min(2 * self._wait, LONGEST_WAIT_S)
            # what it started itself must not go on beside its successor
            _signal_group(self._process.pid, signal.SIGKILL)
            log.warning(
                "%s ended with %s; the last it printed:\n%s",
                self.name,
                self._process.returncode,
                self.last_lines(),
                extra={"child": self.name},
            )
        if now >= self._again:
            self._again = 0.0
            self.start()
        return died

    def stop(self) -> None:
        """Asks it to end, and kills it and what it started if it does not."""
        if self._process is None:
            return
        if self.is_alive:
            self._process.terminate()
            try:
                self._process.wait(GRACE_S)
            except subprocess.TimeoutExpired:
                log.warning("%s did not end in time", self.name, extra={"child": self.name})
        _signal_group(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def last_lines(self, count: int = 8) -> str:
        """The end of what it printed."""
        try:
            with self.output.open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES))
                text = file.read(TAIL_BYTES).decode(errors="replace")
        except OSError:
            return ""
        return "\n".join(text.splitlines()[-count:])

    def _bound_output(self) -> None:
        """Moves what was printed aside once it is too long; the child writes on at the front."""
        try:
            if self.output.stat().st_size <= self.most_output:
                return
            with self.output.open("rb+") as file:
                file.seek(-self.most_output, os.SEEK_END)
                last = file.read(self.most_output)
                # its descriptor appends, so that it goes on at whatever the end is then
                file.truncate(0)
            self.output.with_name(f"{self.output.name}.1").write_bytes(last)
        except OSError:
            # gone, or the disk is full: the child matters more than what it says
            return


def _path() -> str:
    # Flower starts its own programs by name, also where no environment was activated
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])


def _end_with_parent() -> None:
    # a supervisor that is killed outright cannot end its children itself
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _signal_group(pid: int, number: int) -> None:
    try:
        os.killpg(pid, number)
    except (ProcessLookupError, PermissionError):
        return
