"""One round by secure aggregation: what is merged is a sum, and no update is ever seen."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

from fedlora.adapter import AdapterState
from fedlora.errors import SecureAggregationError, StrategyError, UpdateRejected
from fedlora.messages import ClientUpdate
from fedlora.privacy.secagg.quantise import Mean
from fedlora.privacy.secagg.server import SecureServer, Total
from fedlora.privacy.secagg.session import Part, Session, threshold_for
from fedlora.privacy.secagg.work import work_digest
from fedlora.server.admission import admit, expected_size
from fedlora.server.handout import Handout
from fedlora.server.link import Reply, SecureLink, Task
from fedlora.server.merge import Received
from fedlora.wire import decode_broadcast, encode_tensors

SUM = "secure-sum"
"""Name of the one update that a strategy is given."""


class SecureRound:
    """One attempt at one round.

    Args:
        handout: what the clients are asked to do.
        link: the clients.
        quorum: fewest updates of a round.
    """

    def __init__(self, handout: Handout, link: SecureLink, quorum: int) -> None:
        self.handout = handout
        self.link = link
        self.quorum = quorum
        self._senders: dict[str, ClientUpdate] = {}

    def gather(self, tasks: Sequence[Task], parts: Mapping[str, bytes]) -> Received:
        """Takes the clients through a session and returns their sum as one update.

        Raises:
            SecureAggregationError: there is no sum; another attempt may have one.
            StrategyError: the clients' plans are not alike.
        """
        session = self._session(tasks)
        limits = self.handout.run.settings.limits
        most = 1 if limits.uniform else int(limits.max_examples)
        server = SecureServer(session, self.link.identities(), most)
        opening = session.encode()
        self._ask("advertise", dict.fromkeys(session.clients, opening), server.take_advert)
        keys = server.close_adverts()
        levels = server.quantiser
        self._ask("share", dict.fromkeys(server.advertised, keys), server.take_boxes)
        shares = server.close_boxes()
        work = [replace(t, shares=shares[t.client]) for t in tasks if t.client in shares]
        deadline_s = self.handout.run.settings.deadline_s
        for reply in self.link.exchange(work, parts, deadline_s):
            self._take(reply, partial(self._masked, server, reply))
        survivors = server.close_masked()
        self._ask("sign", dict.fromkeys(server.survivors, survivors), server.take_signature)
        signatures = server.close_signatures()
        self._ask("reveal", dict.fromkeys(server.signers, signatures), server.take_reveal)
        total = server.close_reveals()
        return self._received(session, total, levels.mean(total.vector, total.weight))

    def _session(self, tasks: Sequence[Task]) -> Session:
        """One session for all, which needs that all are asked for the same."""
        handout, settings = self.handout, self.handout.run.settings
        job = handout.run.job_sha256
        works = {t.client: work_digest(job, decode_broadcast(t.manifest)) for t in tasks}
        clients = sorted(works)
        shapes = handout.expected[clients[0]].shapes
        for name in clients:
            if works[name] != works[clients[0]]:
                raise StrategyError(
                    f"the work of clients {clients[0]} and {name} differs; secure aggregation "
                    "sums updates of one plan and one start"
                )
        clip = settings.limits.max_update_norm
        return Session(
            run=handout.run.run,
            round=handout.round,
            attempt=handout.attempt,
            work_sha256=works[clients[0]],
            clients=tuple(clients),
            threshold=threshold_for(len(clients), self.quorum),
            bits=settings.secure_bits,
            parts=tuple(
                Part(name, math.prod(shape), clip) for name, shape in sorted(shapes.items())
            ),
        )

    def _ask(
        self, step: str, messages: Mapping[str, bytes], take: Callable[[str, bytes], None]
    ) -> None:
        for reply in self.link.ask(step, messages):
            self._take(reply, partial(take, reply.client, reply.payload))

    def _take(self, reply: Reply, take: Callable[[], None]) -> None:
        """Takes one client's message in, or notes why not."""
        handout = self.handout
        handout.bytes_up += len(reply.manifest) + len(reply.payload)
        handout.bytes_down += reply.bytes_down
        if not reply.payload and not reply.error:
            return
        try:
            if reply.error:
                raise UpdateRejected(reply.client, reply.code, reply.error)
            take()
        except SecureAggregationError as e:
            handout.reject(UpdateRejected(reply.client, "SECURE", str(e)))
        except UpdateRejected as e:
            handout.reject(e)

    def _masked(self, server: SecureServer, reply: Reply) -> None:
        """Checks the manifest as that of any update, and adds the vector to the sum."""
        expected = self.handout.expected[reply.client]
        bare = replace(expected, shapes={}, size_bytes=expected_size({}))
        limits = self.handout.run.settings.limits
        sender = admit(reply.manifest, encode_tensors({}), bare, limits)
        told = server.weight(reply.client)
        if sender.weight != told:
            raise UpdateRejected(
                reply.client, "WEIGHT", f"the update weighs {sender.weight:g}; its keys said {told}"
            )
        server.take_masked(reply.client, reply.payload)
        self._senders[reply.client] = sender

    def _received(self, session: Session, total: Total, mean: Mean) -> Received:
        handout = self.handout
        expected = handout.expected[total.survivors[0]]
        delta = {name: mean.tensors[name].reshape(shape) for name, shape in expected.shapes.items()}
        update = ClientUpdate(
            run=expected.run,
            round=expected.round,
            attempt=expected.attempt,
            client=SUM,
            start_sha256=expected.start_sha256,
            delta=AdapterState(expected.spec, delta),
            num_examples=total.weight,
            metrics={} if mean.loss is None else {"train_loss": mean.loss},
            start=expected.start,
            weight=float(total.weight),
        )
        handout.rejected.sort(key=lambda event: str(event["client"]))
        rejected = {event["client"] for event in handout.rejected}
        facts = {
            "asked": len(session.clients),
            "threshold": session.threshold,
            "bits": session.bits,
            "saturated": mean.saturated,
        }
        return Received(
            updates=[update],
            rejected=handout.rejected,
            missing=sorted(set(session.clients) - set(total.survivors) - rejected),
            bytes_up=handout.bytes_up,
            bytes_down=handout.bytes_down,
            attempt=handout.attempt,
            event={"secure_aggregation": facts},
            # the error of a merge is measured on single updates
            comparable=False,
            senders=[self._senders[name] for name in total.survivors],
        )
