"""Patience: which failures of a call are worth another try, for how long, and what to say."""

from collections.abc import Callable
from datetime import UTC, datetime

import grpc

from fedlora.errors import TransferError

FIRST_WAIT_S = 0.1
LONGEST_WAIT_S = 5.0

PASSING = {
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.ABORTED,
    # the server ended a transfer that stood still, or a stream was reset on the way
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    # the server stands elsewhere than it said, because an earlier try was still being written
    grpc.StatusCode.FAILED_PRECONDITION,
}


class Patience:
    """Tries of one transfer.

    The waits between tries double from 0.1 s to 5 s and start anew when something has moved.

    Args:
        what: is being tried, for the message.
        address: of the server.
        patience_s: without anything moving before the transfer is given up.
        wait: sleeps for the seconds it is given.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        what: str,
        address: str,
        patience_s: float,
        wait: Callable[[float], object],
        clock: Callable[[], float],
    ) -> None:
        self._what = what
        self._address = address
        self._patience_s = patience_s
        self._wait = wait
        self._clock = clock
        self._tries = 0
        self._damaged = False
        self.renew()

    def renew(self) -> None:
        """Something has moved."""
        self._since = self._clock()
        self._next_wait_s = FIRST_WAIT_S

    def after(self, error: grpc.RpcError, *, moved: bool = False) -> None:
        """Waits for the next try.

        Raises:
            TransferError: another try is not worth it, or the patience is at its end.
        """
        self._tries += 1
        if moved:
            self.renew()
        code, details = error.code(), error.details() or ""
        left = self._since + self._patience_s - self._clock()
        if code not in PASSING or is_lasting(details):
            raise self._given_up(code, details) from error
        if left <= 0:
            raise self._given_up(code, details, waited=True) from error
        self._wait(min(self._next_wait_s, left))
        self._next_wait_s = min(2 * self._next_wait_s, LONGEST_WAIT_S)

    def after_damage(self, why: str) -> None:
        """Lets one transfer start again whose bytes came out wrong.

        Raises:
            TransferError: it is the second time.
        """
        self._tries += 1
        if self._damaged:
            raise TransferError(
                f"{self._what}: from or to {self._address}, twice other bytes came than were sent "
                f"({why}); check memory, disk and network of both sides"
            )
        self._damaged = True
        self.renew()

    def _given_up(
        self, code: grpc.StatusCode, details: str, *, waited: bool = False
    ) -> TransferError:
        tries = "try" if self._tries == 1 else "tries"
        how_long = f" and {self._patience_s:g} s without progress" if waited else ""
        return TransferError(
            f"{self._what}: {self._address} after {self._tries} {tries}{how_long}: "
            f"{explain(code, details)}"
        )


def is_lasting(details: str) -> bool:
    """The failure is one of certificates, which no further try repairs."""
    return "CERTIFICATE_VERIFY_FAILED" in details or "certificate" in details.lower()


def explain(code: grpc.StatusCode, details: str) -> str:
    """Why a call failed and what to do, as far as gRPC's text tells."""
    now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    clock = f"this machine's clock says {now}"
    lower = details.lower()
    known = (
        ("connection refused", "nothing listens there; check the address, and start the server"),
        ("not yet valid", f"the server's certificate is not valid yet; {clock}; set it right"),
        ("has expired", f"the server's certificate has expired; {clock}"),
        (
            "certificate_verify_failed",
            "the server's certificate was not issued by the CA this client trusts; compare the "
            "CA files of both sides",
        ),
        (
            "certificate signature failure",
            "the server's certificate bears another CA's signature; compare the CA files of both "
            "sides",
        ),
        ("wrong_version_number", "the server talks plain text, this client TLS"),
        (
            "socket closed",
            "the server hung up; it may not accept this client's certificate (none, expired, or "
            "another CA's), or one side talks TLS and the other plain text",
        ),
        ("ticket expired", f"the ticket has expired; {clock}"),
        ("exception iterating requests", "the file that is being sent cannot be read"),
        ("dns resolution failed", "the host name is not known here"),
    )
    for sign, meaning in known:
        if sign in lower:
            return f"{meaning} ({code.name}: {details[:300]})"
    return f"{code.name}: {details[:600]}"
