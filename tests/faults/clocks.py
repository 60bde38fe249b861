"""Wall clocks that are off, by libfaketime (https://github.com/wolfcw/libfaketime)."""

from pathlib import Path

FAKETIME = Path("/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1")


def faked(skew: str) -> dict[str, str]:
    """The environment of a process whose clock is off."""
    return {"LD_PRELOAD": str(FAKETIME), "FAKETIME": skew}
