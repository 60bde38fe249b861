"""Duty: one client's part of a round as its worker does it, from the order to the update sent."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fedlora.client.courier import Connect, Courier
from fedlora.client.order import Order
from fedlora.client.outbox import Outbox
from fedlora.client.parts import Parts
from fedlora.client.policy import Policy
from fedlora.client.private import SitePrivacy
from fedlora.client.resident import Resident
from fedlora.client.runs import Runs
from fedlora.client.site import site_for
from fedlora.config.job import Job
from fedlora.data.federated import ClientData
from fedlora.errors import (
    AdapterError,
    BudgetExhausted,
    ConfigError,
    DataError,
    FedloraError,
    LedgerError,
    ModelError,
    PolicyError,
    TrainingError,
    TransferError,
    WorkRefused,
)
from fedlora.messages import ClientUpdate
from fedlora.models.loaded import Loaded
from fedlora.privacy.judge import check_private
from fedlora.privacy.ledger import Budget
from fedlora.training.trainer import Progress
from fedlora.wire import encode_update

CODES: dict[type[FedloraError], str] = {
    BudgetExhausted: "BUDGET_EXHAUSTED",
    LedgerError: "LEDGER",
    PolicyError: "POLICY",
    ConfigError: "JOB",
    ModelError: "BASE",
    AdapterError: "SPEC",
    DataError: "DATA",
    TrainingError: "TRAINING",
    TransferError: "TRANSFER",
}


SEE_LOG = "the details are in this client's log"
log = logging.getLogger(__name__)

# stage, steps done, steps planned
Say = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Answer:
    """An update that was made, and (with an exchange) sent.

    Attributes:
        manifest: of the update.
        payload: its tensors, when they are to ride back in the call.
        bytes_down, bytes_up: that went over the exchange.
        seconds_to_first_step: until training began; 0 when nothing was trained.
        seconds: in all.
        kept: it had been made in an earlier call.
    """

    manifest: bytes
    payload: bytes | None
    bytes_down: int
    bytes_up: int
    seconds_to_first_step: float
    seconds: float
    kept: bool


class Duty:
    """Does what a worker is asked for, one order at a time.

    Every update is on disk before it is sent, and what a client keeps from round to round is
    written atomically; so a worker that is killed at any point gives, called again with the
    same manifest, the same bytes.

    Args:
        name: the client.
        folder: its own; outlives the process.
        resident: model and data.
        connect: opens the exchange at HOST:PORT.
        policy: what this site permits.
    """

    def __init__(
        self, name: str, folder: Path, resident: Resident, connect: Connect, policy: Policy
    ) -> None:
        self.name = name
        self.folder = folder
        self.resident = resident
        self.connect = connect
        self.policy = policy
        self.outbox = Outbox(folder / "outbox")
        self.runs = Runs(folder / "runs")

    def do(self, order: Order, say: Say) -> Answer:
        """Answers an order.

        Args:
            say: hears of every stage; what it raises ends the work.

        Raises:
            WorkRefused: it cannot or may not be done.
            StorageError: the disk refused.
        """
        try:
            return self._do(order, say)
        except WorkRefused:
            raise
        except tuple(CODES) as e:
            code = next(code for kind, code in CODES.items() if isinstance(e, kind))
            if code == "DATA" and order.job.privacy is not None:
                log.error("%s", e)
                # it may quote an example
                raise WorkRefused(code, f"the data cannot be used; {SEE_LOG}") from e
            raise WorkRefused(code, str(e)) from e

    def _do(self, order: Order, say: Say) -> Answer:
        started = time.monotonic()
        self.outbox.drop(order.acknowledged)
        plan = order.broadcast.plan
        if plan.client != self.name:
            raise WorkRefused(
                "SPEC",
                f"the work is for client {plan.client!r}, this is {self.name!r}; give every "
                "client a name of its own, the same at the server and here",
            )
        here = self.resident.as_here(order.job)
        self.policy.check_job(here)
        self.policy.check_broadcast(order.broadcast)
        first_step = 0.0

        def progress(done: int, planned: int) -> None:
            nonlocal first_step
            first_step = first_step or time.monotonic() - started
            say("training", done, planned)

        own = self.runs.use(plan.run)
        parts = Parts(own / "parts")
        with Courier(order, parts, self.connect, self.policy) as courier:
            kept = self.outbox.find(order.key)
            was_kept = kept is not None
            if kept is None:
                update = self._train(order, here, own, courier, say, progress)
                parts.prune(set(order.broadcast.parts.values()))
                kept = self.outbox.keep(order.key, *encode_update(update))
                if plan.round >= here.federation.rounds:
                    self.runs.finish(plan.run)
            say("sending", 0, 0)
            payload = courier.send(kept)
            return Answer(
                kept.manifest,
                payload,
                courier.down,
                courier.up,
                first_step,
                time.monotonic() - started,
                was_kept,
            )

    def _train(
        self, order: Order, job: Job, own: Path, courier: Courier, say: Say, progress: Progress
    ) -> ClientUpdate:
        if not self.resident.holds(job):
            say("loading", 0, 0)
        loaded = self.resident.hold(job)
        self.policy.check_base(loaded.base.fingerprint)
        _check_base(order, loaded)
        say("fetching", 0, 0)
        data = loaded.data.clients[self.name]
        privacy = self._privacy(job, data)
        site = site_for(job, loaded, self.name, data, own / "clients" / self.name, privacy)
        return site.work(order.manifest, courier.fetch, progress)

    def _privacy(self, job: Job, data: ClientData) -> SitePrivacy | None:
        """What is done for the privacy of each example; within the site's own limits."""
        if job.privacy is None or job.privacy.unit != "record":
            return None
        check_private(job)
        limits = self.policy.privacy
        site = None
        if limits.budget_epsilon is not None:
            site = Budget(limits.budget_epsilon, limits.budget_delta)
        privacy = SitePrivacy(job, data, self.folder / "privacy", site=site)
        self.policy.check_noise(privacy.terms.noise_multiplier)
        return privacy


def _check_base(order: Order, loaded: Loaded) -> None:
    asked, found = order.base_fingerprint, loaded.base.fingerprint
    if asked and asked != found:
        raise WorkRefused(
            "BASE",
            f"the server's base model is {asked[:12]}, model.name = {order.job.model.name!r} is "
            f"{found[:12]} here; give both the same files (and model.revision, for a hub model)",
        )
