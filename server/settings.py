"""ServerSettings: what `fedlora server` was started with, for its other processes."""

import json
from dataclasses import dataclass

from fedlora.errors import RunFolderError
from fedlora.server.home import Home
from fedlora.storage import write_atomic


@dataclass(frozen=True)
class ServerSettings:
    """Kept in the server's folder.

    Attributes:
        exchange: HOST:PORT where clients reach the exchange; without a host, where they reach
            everything else.
        device: of the server's own evaluations.
        allow_plugins: jobs may bring the file of their strategy.
    """

    exchange: str
    device: str = "cpu"
    allow_plugins: bool = False

    def write(self, home: Home) -> None:
        """Keeps the settings.

        Raises:
            StorageError: the disk refused.
        """
        write_atomic(home.folder / "server.json", json.dumps(vars(self)).encode())

    @classmethod
    def read(cls, home: Home) -> "ServerSettings":
        """The settings of the server that is running, or ran last.

        Raises:
            RunFolderError: there are none.
        """
        path = home.folder / "server.json"
        try:
            return cls(**json.loads(path.read_bytes()))
        except (OSError, ValueError, TypeError) as e:
            raise RunFolderError(
                f"{path} cannot be read ({e}); start the server again with: fedlora server"
            ) from e
