"""Wall clocks that are off, by libfaketime (https://github.com/wolfcw/libfaketime)."""

from pathlib import Path

FAKETIME = Path("/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1")


def faked(skew: str) -> dict[str, str]:
    """The environment of a process whose clock is off."""
    return {"LD_PRELOAD": str(FAKETIME), "FAKETIME": skew}


def told_by(path: Path) -> dict[str, str]:
    """The environment of a process whose wall clock is off by what a file holds, live."""
    return {
        "LD_PRELOAD": str(FAKETIME),
        "FAKETIME_TIMESTAMP_FILE": str(path),
        "FAKETIME_NO_CACHE": "1",
        # a clock that is set leaves the monotonic one alone
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
    }
