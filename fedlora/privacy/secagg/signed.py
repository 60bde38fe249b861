"""SignedSets: what a client remembers so that no round's sum is taken twice in two ways.

Two sums of one round over different clients differ by single updates. A sum needs the
signatures of t clients, and any two groups of t share an honest one (unless 2t - n or more
collude), so that it is enough that each client signs once per round.
"""

from fedlora.errors import SecureAggregationError


class SignedSets:
    """One client's signatures, by run and round."""

    def __init__(self) -> None:
        self._signed: dict[tuple[str, int], tuple[frozenset[str], str]] = {}

    def sign(self, run: str, number: int, survivors: frozenset[str], values_sha256: str) -> None:
        """Notes that the sum of these clients may be taken.

        The same sum again gives nothing away: a round that is repeated after a crash, by the
        same clients with the same values, is no other.

        Args:
            values_sha256: of the client's own vector before masks.

        Raises:
            SecureAggregationError: the client has signed another sum of this round.
        """
        sum_ = (survivors, values_sha256)
        if self._signed.setdefault((run, number), sum_) != sum_:
            raise SecureAggregationError(
                f"the server asks for a second sum of round {number}, over other clients or "
                "values; the difference of two sums would show single updates"
            )
