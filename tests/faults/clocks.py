"""Wall clocks that are off, by libfaketime (https://github.com/wolfcw/libfaketime)."""

import os
import subprocess
import sys
from functools import cache
from pathlib import Path

FAKETIME = Path("/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1")


def faked(skew: str) -> dict[str, str]:
    """The environment of a process whose clock is off."""
    return {"LD_PRELOAD": str(FAKETIME), "FAKETIME": skew}


@cache
def waits_end(skew: str) -> bool:
    """Whether a process whose clock is off can wait at all, which not every libfaketime allows.

    Python waits on the monotonic clock; with some C libraries a wait that is begun under a
    shifted one never ends.
    """
    program = "import threading, time; threading.Event().wait(0.01); time.sleep(0.01)"
    try:
        done = subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, **faked(skew)},
            capture_output=True,
            timeout=10.0,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0
