"""CentralRecord: what a run that protects clients has spent, up to the last committed round."""

from collections.abc import Iterable, Mapping
from typing import Any

from fedlora.messages import ClientUpdate
from fedlora.privacy.client_level import Terms
from fedlora.server.privacy_record import PrivacyRecord


def privacy_record(terms: Terms | None, found: Mapping[str, Any] | None) -> PrivacyRecord:
    """The record of a run with these terms, or of clients that state what they spent."""
    return CentralRecord(terms, found) if terms else PrivacyRecord(found)


class CentralRecord(PrivacyRecord):
    """What the server's own mechanism promises; clients state nothing.

    Args:
        terms: of the run.
        found: field "privacy" of the last committed round's record.

    Attributes:
        next_clip: S of the next round.
        noise_multiplier: z of the last round.
    """

    def __init__(self, terms: Terms, found: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        self.terms = terms
        self._found = dict(found or {})

    @property
    def next_clip(self) -> float:
        """S of the next round."""
        return float(self._found.get("next_clip", self.terms.clip))

    @property
    def noise_multiplier(self) -> float:
        """Z of the last round."""
        return float(self._found.get("noise_multiplier", self.terms.noise_multiplier))

    def note(
        self,
        *,
        clip: float,
        noise_multiplier: float,
        next_clip: float,
        steps: int,
        epsilon: float | None,
    ) -> None:
        """Takes in what a round did.

        Args:
            clip, noise_multiplier: S and z of the round.
            next_clip: S of the next one.
            steps: rounds that were paid so far.
            epsilon: that they spent; None where nothing is promised.
        """
        self._found = {
            "clip": clip,
            "noise_multiplier": noise_multiplier,
            "next_clip": next_clip,
            "steps": steps,
            "epsilon": epsilon,
        }

    def add(self, updates: Iterable[ClientUpdate]) -> None:
        """Nothing: the one update of a round is the mechanism's own."""

    def to_json(self) -> dict[str, Any]:
        """What `CentralRecord` takes."""
        return dict(self._found)

    def summary(self) -> dict[str, Any] | None:
        """What the run as a whole can say; None before its first round."""
        if not self._found:
            return None
        shown = {key: value for key, value in self._found.items() if key != "next_clip"}
        return {**self.terms.summary(), **shown}
