"""Wall clocks that are off, by libfaketime (https://github.com/wolfcw/libfaketime)."""

from pathlib import Path

FAKETIME = Path("/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1")


def faked(skew: str) -> dict[str, str]:
    """The environment of a process whose clock is off.

    Its monotonic clock is not: that of a machine whose date is wrong runs as any other, and
    waits that end by a shifted one never end.
    """
    return {
        "LD_PRELOAD": str(FAKETIME),
        "FAKETIME": skew,
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        "DONT_FAKE_MONOTONIC": "1",
    }
