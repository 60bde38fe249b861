"""Every exception a user or a peer can cause, and the exit code it ends with.

    FedloraError
    ├── ConfigError          job file, override or combination of settings        exit 2
    ├── DataError            data file, column, row or partition                  exit 2
    ├── ModelError           base model missing, foreign or of another kind       exit 2
    ├── AdapterError         adapter file or spec that does not fit               exit 2
    │   └── CodeError        coded values that decode to nothing
    ├── TrainingError        one client cannot train; its update is missing        exit 2
    ├── RunFolderError       run folder corrupt, locked or of another job         exit 2
    ├── JoinRefused          a server that will not have this client as it is     exit 2
    ├── JoinDelayed          a server that is not there yet; tried again
    ├── TicketError          ticket of a transfer: forged, expired, malformed      exit 2
    ├── TransferError        bytes that could not be moved, after the retries      exit 3
    ├── UploadRefused        one upload that the server does not take              exit 2
    ├── CertificateError     key, certificate or request missing or unusable      exit 2
    ├── ClockError           this machine's clock and the server's are apart      exit 2
    ├── PolicyError          the server asks for what the site does not permit    exit 2
    ├── WorkRefused          one client's work that its worker does not do         exit 2
    ├── LedgerError          privacy ledger missing, damaged or another's          exit 2
    ├── BudgetExhausted      a release that the privacy budget does not cover      exit 4
    ├── SecureAggregationError  a secure sum that must not go on; tried again      exit 2
    ├── RunFailed            the run stopped; what was committed stands           exit 3
    │   ├── QuorumFailed     too few updates, also after the retries
    │   ├── StorageError     disk full or unwritable
    │   └── StrategyError    a strategy raised or returned something unusable
    └── UpdateRejected       one client's update; never ends a run

Messages name the object, what was found, what was expected and what to do.
"""

import math
from collections.abc import Iterable
from difflib import get_close_matches

# characters of what a peer wrote that are passed on
MOST_SHOWN = 500

EXIT_USAGE = 2
EXIT_FAILED = 3
EXIT_BUDGET = 4
EXIT_INTERRUPTED = 130


class FedloraError(Exception):
    """Base of every error that fedlora raises on purpose."""

    exit_code = EXIT_USAGE


class ConfigError(FedloraError):
    """One or more problems in a job; `problems` lists them all."""

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class DataError(FedloraError):
    """Data that cannot be read as the job says."""


class ModelError(FedloraError):
    """A base model that is missing or not what the job or the peer says."""


class AdapterError(FedloraError):
    """An adapter, factor or spec that does not fit where it is used."""


class CodeError(AdapterError):
    """Coded tensors with a value that no encoder makes."""


class TrainingError(FedloraError):
    """Local training that cannot go on, e.g. a loss that is not finite."""


class RunFolderError(FedloraError):
    """A run folder that cannot be created, read, locked or resumed."""


class JoinRefused(FedloraError):
    """A server will not have this client as it is; trying again would not help."""


class JoinDelayed(FedloraError):
    """A server is not there, or not ready; trying again may help."""

    exit_code = EXIT_FAILED


class TicketError(FedloraError):
    """A ticket that the exchange does not honour."""

    def __init__(self, problem: str) -> None:
        super().__init__(f"ticket {problem}")


class TransferError(FedloraError):
    """Bytes that could not be fetched or sent, after all retries."""

    exit_code = EXIT_FAILED


class UploadRefused(FedloraError):
    """One upload that the server does not take.

    Args:
        code: "busy" (another one is under way), "taken" (the client's reply is another one),
            "closed" (the round is over),
            "offset" (the server stands elsewhere), "size" (more or fewer bytes than announced),
            "digest" (other bytes than announced).
        detail: what was found and what was expected.
    """

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(f"upload refused ({code}): {detail}")
        self.code = code


class CertificateError(FedloraError):
    """A key, certificate, request or authority that is missing, damaged or does not fit."""


class ClockError(FedloraError):
    """Clocks that are too far apart to authenticate."""


class PolicyError(FedloraError):
    """A server asks for what the site's policy does not permit; `problems` lists it all."""

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class WorkRefused(FedloraError):
    """Work that a client's worker does not do, or could not end.

    Args:
        code: one of those of `Refused` in worker.proto.
        detail: what was found, what was expected, and what to do.
    """

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(detail)
        self.code = code


class LedgerError(FedloraError):
    """A privacy ledger that is missing, damaged, rolled back, locked or of other data."""


class BudgetExhausted(FedloraError):
    """A release that would spend more than a privacy budget; nothing was spent on it.

    Args:
        message: what was asked, what is spent, and of which budget.
        budget: epsilon that may be spent; these three are NaN where only a client knows.
        spent: epsilon spent before.
        asked: epsilon after the release.
    """

    exit_code = EXIT_BUDGET

    def __init__(
        self,
        message: str,
        *,
        budget: float = math.nan,
        spent: float = math.nan,
        asked: float = math.nan,
    ) -> None:
        super().__init__(message)
        self.budget = budget
        self.spent = spent
        self.asked = asked


class SecureAggregationError(FedloraError):
    """A message of secure aggregation that is refused, or a sum that cannot be taken.

    Args:
        detail: what was found and what was expected.
        client: whose fault it is; empty when it is nobody's, or the server's.
    """

    def __init__(self, detail: str, client: str = "") -> None:
        super().__init__(detail)
        self.client = client


class RunFailed(FedloraError):
    """A run that stopped early; every committed round stands."""

    exit_code = EXIT_FAILED


class QuorumFailed(RunFailed):
    """Fewer acceptable updates than the quorum, also after the retries."""


class StorageError(RunFailed):
    """The disk refused a write."""


class StrategyError(RunFailed):
    """A strategy raised, or returned tensors of the wrong shape or not finite."""


class UpdateRejected(FedloraError):
    """One client's update was refused; the round goes on without it.

    Args:
        client: name of the client.
        code: short machine-readable reason, e.g. "SHAPE" or "STALE".
        detail: what was found and what was expected.
    """

    def __init__(self, client: str, code: str, detail: str) -> None:
        super().__init__(f"update of client {client!r} rejected ({code}): {detail}")
        self.client = client
        self.code = code
        self.detail = detail


def shown(text: str, most: int = MOST_SHOWN) -> str:
    """What a peer wrote, fit for a message, a journal or a terminal.

    It is cut to `most` characters; what cannot be printed, an escape sequence among it, is spelt
    out.
    """
    cut = text if len(text) <= most else text[: most - 3] + "..."
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode()
        for c in cut
    )


def near_miss(name: str, known: Iterable[str]) -> str:
    """The hint ` (did you mean "x"?)`, or nothing when no known name is close."""
    close = get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f' (did you mean "{close[0]}"?)' if close else ""
