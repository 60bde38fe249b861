"""PrivacyRecord: what clients' ledgers have said, up to the last committed round."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

from fedlora.messages import ClientUpdate, PrivacyStatement
from fedlora.privacy.scope import NOT_COVERED


class PrivacyRecord:
    """The last statement of every client.

    Each example lives at one client, so the run as a whole is private to (max epsilon, max
    delta) over clients: parallel composition, McSherry, "Privacy Integrated Queries", SIGMOD
    2009, theorem 4.

    Args:
        found: field "privacy" of the last committed round's record.
    """

    def __init__(self, found: Mapping[str, Any] | None = None) -> None:
        self.statements = {
            client: PrivacyStatement(**fields) for client, fields in (found or {}).items()
        }

    def entry(self, client: str) -> int:
        """The last ledger entry that a client has quoted; 0 if none."""
        known = self.statements.get(client)
        return known.entry if known else 0

    def add(self, updates: Iterable[ClientUpdate]) -> None:
        """Takes in the statements of a round's updates."""
        for update in updates:
            if update.privacy is not None:
                self.statements[update.client] = update.privacy

    def to_json(self) -> dict[str, Any]:
        """By client; what `PrivacyRecord` takes."""
        return {client: asdict(found) for client, found in sorted(self.statements.items())}

    def summary(self) -> dict[str, Any] | None:
        """What the run as a whole can say; None without any statement."""
        found = list(self.statements.values())
        if not found:
            return None
        private = all(statement.epsilon is not None for statement in found)
        return {
            "unit": found[0].unit,
            "adjacency": f"add or remove one {found[0].unit}",
            "epsilon": max(s.epsilon or 0.0 for s in found) if private else None,
            "delta": max(s.delta for s in found),
            "accountant": found[0].accountant,
            "noise_multiplier": min(s.noise_multiplier for s in found),
            "clip": max(s.clip for s in found),
            "steps": max(s.steps for s in found),
            "noise": ", ".join(sorted({s.noise for s in found})),
            "private": private,
            "not_covered": list(NOT_COVERED[found[0].unit]),
        }
