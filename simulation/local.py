"""LocalLink: every client in this process, through the same bytes as over a network."""

from collections.abc import Callable, Iterator

from fedlora.server.link import Reply
from fedlora.simulation.clients import Answer, Work, answer
from fedlora.simulation.scenario import Scenario
from fedlora.simulation.virtual import Asked, VirtualLink


class LocalLink(VirtualLink):
    """Runs tasks one after the other, or, submitted, in the order in which they are due.

    Args:
        scenario: who exists, who is absent, slow or hostile.
        work: (client, manifest, fetch) -> update; does one client's part of a round.
        progress: called with a client's name when its work begins.
    """

    def __init__(
        self, scenario: Scenario, work: Work, progress: Callable[[str], None] | None = None
    ) -> None:
        super().__init__(scenario, progress)
        self.work = work

    def close(self) -> None:
        """There is nothing to let go of."""

    def _begin(self, asked: Asked) -> Iterator[Reply]:
        yield self._reply(asked, self._answer(asked))

    def _rest(self) -> Iterator[Reply]:
        yield from ()

    def _answer(self, asked: Asked) -> Answer:
        self.progress(asked.client)
        return answer(self.work, self.scenario, asked.task, asked.parts.__getitem__)
