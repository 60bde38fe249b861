"""Remote: a run on a server, as its operator's own folder remembers it."""

import json
from dataclasses import dataclass
from pathlib import Path

from fedlora.cli.server import find_certificate
from fedlora.client.operator import Operator
from fedlora.errors import RunFolderError
from fedlora.storage import write_atomic

REMOTE = "remote.json"


@dataclass(frozen=True)
class Remote:
    """A run on a server.

    Attributes:
        server: HOST:PORT.
        run: lineage id.
        certs: folder of the operator's certificate; None for plain text.
        job: the job, as TOML.
    """

    server: str
    run: str
    certs: str | None
    job: str

    def write(self, folder: Path) -> None:
        """Keeps it in the run's own folder.

        Raises:
            StorageError: the disk refused.
        """
        write_atomic(folder / REMOTE, json.dumps(vars(self)).encode())

    @classmethod
    def read(cls, folder: Path) -> "Remote":
        """What `write` kept.

        Raises:
            RunFolderError: it cannot be read.
        """
        try:
            return cls(**json.loads((folder / REMOTE).read_bytes()))
        except (OSError, ValueError, TypeError) as e:
            raise RunFolderError(f"{folder / REMOTE} cannot be read: {e}") from e

    def operator(self) -> Operator:
        """Who can ask the server about it.

        Raises:
            ConfigError: the certificate cannot be used.
        """
        tls = find_certificate(Path(self.certs)) if self.certs else None
        return Operator(self.server, tls)
