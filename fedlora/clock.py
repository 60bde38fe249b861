"""How far the clocks of a client and its server may be apart."""

import math

from fedlora.errors import ClockError

# what flwr 1.41 adds for the way of a request before it calls its time stamp too old
BEHIND_S = 300.0


def check_clock(own_s: float, server_s: float, tolerance_s: float = 5.0) -> None:
    """Accepts a client's clock that Flower's server will accept.

    A SuperNode signs the time of each request. Flower takes it when it is less than 5 s ahead
    of the server's clock and less than 305 s behind; later than that, authentication fails,
    and a SuperNode whose heartbeat is refused shuts down.

    Args:
        own_s: this machine's clock, seconds since 1970-01-01 UTC.
        server_s: the server's clock at about the same time.
        tolerance_s: seconds the own clock may be ahead, and behind beyond 300 s.

    Raises:
        ClockError: outside these bounds.
    """
    if not math.isfinite(server_s):
        raise ClockError(f"the server says its clock is at {server_s} s; expected a finite number")
    ahead = own_s - server_s
    if -(BEHIND_S + tolerance_s) < ahead < tolerance_s:
        return
    way = "ahead of" if ahead > 0 else "behind"
    raise ClockError(
        f"this machine's clock is {abs(ahead):.1f} s {way} the server's; Flower authenticates a "
        f"SuperNode only from {tolerance_s:g} s ahead to {BEHIND_S + tolerance_s:g} s behind; set "
        "both clocks, e.g. by NTP"
    )
