"""HeldParts: which parts each simulated client holds, so that bytes down are counted once."""

import json
from collections.abc import Collection, Iterable
from pathlib import Path

from fedlora.storage import write_atomic
from fedlora.wire import encode_json

# client -> digests
Held = dict[str, list[str]]


class HeldParts:
    """The digests of the parts that clients hold from earlier rounds.

    After a resume of an asynchronous run, bytes down count parts once more that clients held.
    """

    def __init__(self) -> None:
        self._held: Held = {}
        self._path: Path | None = None
        # of the last two rounds: the last one may be cut off before its commit
        self._by_round: dict[int, Held] = {}

    def remember(self, path: Path, committed: int) -> None:
        """Keeps what clients hold in a file, and takes up what they held after a round.

        A resumed run then counts the same bytes as one that was never interrupted. Without a
        readable file clients hold nothing, and are sent everything once more.

        Args:
            path: the file.
            committed: the round the run goes on from.
        """
        self._path = path
        try:
            found = json.loads(path.read_text("utf-8"))
            self._by_round = {int(n): held for n, held in found.items() if int(n) <= committed}
        except (OSError, ValueError, AttributeError):
            self._by_round = {}
        self._held = dict(self._by_round.get(committed, {}))

    def fetch(self, client: str, fetched: Collection[str], named: Iterable[str]) -> set[str]:
        """Notes what a client asked for, and says what of it had to be sent.

        Args:
            client: its name.
            fetched: digests it asked for.
            named: digests its broadcast names; what it held besides is of no more use.
        """
        held, asked = set(self._held.get(client, ())), set(fetched)
        self._held[client] = sorted((held & set(named)) | asked)
        return asked - held

    def commit(self, number: int) -> None:
        """Writes down what clients hold after round `number`, once there is a file.

        Raises:
            StorageError: the disk refused.
        """
        if self._path is None:
            return
        kept = {n: held for n, held in self._by_round.items() if n == number - 1}
        self._by_round = {**kept, number: dict(self._held)}
        write_atomic(self._path, encode_json({str(n): held for n, held in self._by_round.items()}))
