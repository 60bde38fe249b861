"""Unusable: well-formed rows that gave no example, or only part of one, by reason."""

from collections.abc import Iterable
from dataclasses import dataclass, field

EMPTY_TEXT = "empty text"
EMPTY_PROMPT = "empty prompt"
EMPTY_COMPLETION = "empty completion"
NO_COMPLETION_LEFT = "nothing left of the completion within max_length"
NO_ASSISTANT = "no assistant turn with text"
EMPTY_LABEL = "empty label"
UNREADABLE_PICTURE = "unreadable picture"
TOO_SHORT = "fewer than two tokens"
UNASSIGNED = "given to no client by the partition"
BEYOND = "of clients beyond partition.clients"


@dataclass(frozen=True)
class Unusable:
    """Where the rows came from ("file.jsonl:17") that were not used, or not in full.

    Attributes:
        dropped: reason to the origins of the rows that gave no example.
        cut: origins of the rows that were cut to max_length; their beginning is used.
    """

    dropped: dict[str, list[str]] = field(default_factory=dict)
    cut: list[str] = field(default_factory=list)

    def drop(self, reason: str, origin: str) -> None:
        """Note a row that gave no example."""
        self.dropped.setdefault(reason, []).append(origin)

    @property
    def num_dropped(self) -> int:
        """Rows that gave no example."""
        return sum(map(len, self.dropped.values()))

    @property
    def counts(self) -> dict[str, int]:
        """Rows per reason, by name; "cut to max_length" counts rows that are still used."""
        counts = {reason: len(origins) for reason, origins in sorted(self.dropped.items())}
        return counts | ({"cut to max_length": len(self.cut)} if self.cut else {})

    @staticmethod
    def merge(parts: "Iterable[Unusable]") -> "Unusable":
        """All parts as one; origins keep their order."""
        merged = Unusable()
        for part in parts:
            for reason, origins in part.dropped.items():
                merged.dropped.setdefault(reason, []).extend(origins)
            merged.cut.extend(part.cut)
        return merged
