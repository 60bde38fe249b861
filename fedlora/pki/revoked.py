"""The list of certificates that are no longer good, and a reader that follows it.

The list is a small JSON file and not a CRL, because gRPC in Python takes none: the server
looks each caller's serial number up itself.
"""

import json
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from fedlora.errors import CertificateError
from fedlora.pki.files import write_over


@dataclass(frozen=True)
class Entry:
    """One revoked certificate.

    Attributes:
        serial: serial number, lower-case hexadecimal.
        name: whom the certificate names.
        when: time of the revocation, ISO 8601 in UTC.
    """

    serial: str
    name: str
    when: str


def read_revoked(path: Path) -> list[Entry]:
    """The entries of the list.

    Raises:
        CertificateError: missing or damaged.
    """
    try:
        value = json.loads(path.read_bytes())
        entries = [Entry(**entry) for entry in value["revoked"]]
        for entry in entries:
            int(entry.serial, 16)
            if not isinstance(entry.name, str) or not isinstance(entry.when, str):
                raise TypeError("a name or time that is no text")
    except OSError as e:
        problem = e.strerror or str(e)
    except (ValueError, TypeError, KeyError, RecursionError) as e:
        problem = f"{type(e).__name__}: {e}"
    else:
        return entries
    raise CertificateError(
        f"the list of revoked certificates {path} cannot be used ({problem}); restore it from a "
        "copy, or revoke again what was on it"
    )


def write_revoked(path: Path, entries: Sequence[Entry]) -> None:
    """Replaces the list, whole."""
    value = {"revoked": [asdict(entry) for entry in entries]}
    write_over(path, json.dumps(value, indent=1).encode() + b"\n")


class Revoked:
    """Follows `revoked.json`: read again whenever the file changes. Safe between threads.

    A list that is missing or damaged revokes everybody, because nobody can tell any more who
    is on it; `problem` then says what is wrong.

    Args:
        path: the file that `fedlora certs revoke` writes.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.problem = ""
        self._lock = threading.Lock()
        self._seen: tuple[int, ...] | None = None
        self._serials: frozenset[int] = frozenset()

    def is_revoked(self, serial: int) -> bool:
        """Whether the certificate with this serial number must be refused."""
        with self._lock:
            self._follow()
            return bool(self.problem) or serial in self._serials

    def _follow(self) -> None:
        try:
            found = self.path.stat()
            # the writer renames a new file into place, so the inode changes with the content
            now: tuple[int, ...] = (found.st_ino, found.st_mtime_ns, found.st_size)
        except OSError:
            now = ()
        if now == self._seen:
            return
        try:
            self._serials = frozenset(int(e.serial, 16) for e in read_revoked(self.path))
            self.problem = ""
        except CertificateError as e:
            self.problem = str(e)
        # the time before reading: what changes meanwhile is read again at the next call
        self._seen = now
