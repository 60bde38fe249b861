"""Run: the server's side of one job, from the loaded model to committed rounds."""

import math
import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fedlora.adapter import AdapterSpec, AdapterState, trained_shapes
from fedlora.adapters import METHODS
from fedlora.checkpoint import Committed, RunStore
from fedlora.compress import agreed
from fedlora.config.job import Job
from fedlora.config.load import dump_job
from fedlora.data.example import Example
from fedlora.errors import ConfigError, RunFolderError
from fedlora.evaluate import evaluate, exact_match
from fedlora.models.loaded import Loaded
from fedlora.privacy.client_level import Terms
from fedlora.privacy.judge import check_private
from fedlora.server.admission import Limits, demand_of
from fedlora.server.buffered import BufferedRounds, BufferSettings
from fedlora.server.central_record import CentralRecord, privacy_record
from fedlora.server.client_privacy import client_terms, run_private
from fedlora.server.journal import Event
from fedlora.server.link import AsyncLink, Link, SecureLink
from fedlora.server.machine import machine
from fedlora.server.metrics import MetricsLog
from fedlora.server.privacy_record import PrivacyRecord
from fedlora.server.rounds import resume_state, run_rounds
from fedlora.server.run_parts import Evaluate, RoundSettings, RunParts
from fedlora.strategies.base import Conditions, Strategy, StrategyState
from fedlora.strategies.plugin import begin, check_strategy, make_strategy
from fedlora.wire import encode_json

Emit = Callable[[Event], None]
Scores = dict[str, float]


class Run:
    """One run, whatever carries its bytes.

    Args:
        job: the run's job.
        loaded: model and data of the server.
        emit: receives every event, besides metrics.jsonl.

    Attributes:
        privacy: what was spent, by clients or by the server, once `go` was called.
    """

    def __init__(self, job: Job, loaded: Loaded, emit: Emit | None = None) -> None:
        self.job = job
        self.loaded = loaded
        self.emit = emit or (lambda event: None)
        self.spec: AdapterSpec = loaded.initial.spec
        self.method = METHODS[self.spec.method]
        self.privacy = PrivacyRecord()
        self.strategy: Strategy = make_strategy(job.federation, self.method)
        derived = self.method.basis_provenance == "derived"
        # what must be sent, for others cannot make it themselves
        self.sent_basis = loaded.adapted.basis if derived else {}
        # made by `check`, which knows how many clients there are
        self._terms: Terms | None = None

    def check(self, ranks: Sequence[int]) -> None:
        """Refuses what the strategy cannot do with clients of these ranks.

        Raises:
            ConfigError: with what does not go together.
            BudgetExhausted: no noise is large enough for the job's privacy budget.
        """
        job = self.job
        check_private(job)
        given = self._conditions(ranks)
        check_strategy(self.strategy, given)
        self._terms = client_terms(job, self.strategy, given)

    def misfit(self, rank: int) -> str:
        """Why a client of this rank can take no part; empty when it can."""
        try:
            check_strategy(self.strategy, self._conditions([rank]))
        except ConfigError as e:
            return str(e)
        return ""

    def _conditions(self, ranks: Sequence[int]) -> Conditions:
        job = self.job
        return Conditions(
            self.spec,
            list(ranks),
            clients_per_round=job.federation.clients_per_round,
            optimizer=job.training.optimizer,
            optimizer_state=job.training.optimizer_state,
            momentum=job.training.momentum,
            privacy=job.privacy.unit if job.privacy else None,
            asynchronous=job.federation.mode == "async",
            compression=agreed(job.compression),
            secure=job.federation.secure_aggregation,
        )

    def create(self, folder: Path, facts: Mapping[str, Any], run_id: str | None = None) -> RunStore:
        """Creates the run folder with round 0 and reports the start.

        Args:
            folder: must not exist, or be empty.
            facts: further fields of the start event.
            run_id: lineage id; by default a random one.

        Raises:
            RunFolderError: the folder is not empty.
            StorageError: the disk refused.
        """
        job, loaded = self.job, self.loaded
        num_trained = sum(
            int(torch.Size(shape).numel())
            for shape in trained_shapes(self.spec, self.method).values()
        )
        start: Event = {
            "event": "start",
            "round": 0,
            "name": job.run.name,
            "strategy": job.federation.strategy,
            "method": self.spec.method,
            "rounds": job.federation.rounds,
            "num_trained": num_trained,
            "num_test": len(loaded.data.test),
            "personal": self.strategy.personal,
            "eval": self.base_scores(),
            "labels": list(loaded.data.labels),
            "machine": machine(job.run.threads),
            **facts,
        }
        events = [start]
        record = {
            "run": run_id or secrets.token_hex(8),
            "spec_digest": self.spec.digest(),
            "extra": {},
            "events": events,
        }
        state = begin(self.strategy, loaded.initial)
        if self._terms is not None:
            sent = trained_shapes(self.spec, self.method, self.strategy.factors(state))
            if why := self._terms.warning(sent):
                events.append({"event": "warning", "round": 0, "why": why})
        files = {"spec.json": encode_json(self.spec.to_json())}
        store = RunStore.create(folder, dump_job(job), job.digest(), state.tensors, record, files)
        for event in events:
            metrics_log(store).append(event)
            self.emit(event)
        return store

    def go(
        self,
        store: RunStore,
        link: Link,
        *,
        evaluate: Evaluate | None,
        asynchronous: AsyncLink | None = None,
        secure: SecureLink | None = None,
        least: int = 1,
        until: int | None = None,
    ) -> StrategyState:
        """Runs from the last committed round to `until` (by default the end).

        Args:
            store: the run's folder.
            link: the clients.
            evaluate: measures a state; None where there is nothing to measure on.
            asynchronous: the clients again, for federation.mode = "async".
            secure: the clients again, for federation.secure_aggregation = true.
            least: a round needs so many updates, and more where the job says so.

        Raises:
            RunFailed: the run stopped early; see `run_rounds`.
            BudgetExhausted: the privacy budget is spent; committed rounds stand.
            RunFolderError: the folder belongs to another base model or adapter.
        """
        committed = store.load()
        genesis = store.record(0) or committed.record
        if genesis.get("spec_digest", self.spec.digest()) != self.spec.digest():
            raise RunFolderError(
                f"{store.folder} was started with another base model or adapter than this "
                "machine makes from its job; restore the base model it was started with"
            )
        log = metrics_log(store)
        log.reconcile(store, committed.round)
        if store.fallback:
            self.emit({"event": "fallback", "why": store.fallback})

        def emit(event: Event) -> None:
            log.append(event)
            self.emit(event)

        self.privacy = privacy_record(self._terms, committed.record.get("privacy"))
        if committed.round:
            emit({"event": "resume", "round": committed.round})
        parts = RunParts(
            run=str(committed.record["run"]),
            store=store,
            link=link,
            strategy=self.strategy,
            method=self.method,
            basis=self.loaded.adapted.basis,
            sent_basis=self.sent_basis,
            settings=self._settings(least),
            evaluate=evaluate,
            emit=emit,
            privacy=self.privacy,
            secure=secure,
            job_sha256=self.job.digest(),
        )
        initial = begin(self.strategy, self.loaded.initial)
        state = resume_state(committed, initial)
        if isinstance(self.privacy, CentralRecord):
            return run_private(parts, self.privacy, state, until)
        if self.job.federation.mode == "sync":
            return run_rounds(parts, state, until)
        assert asynchronous is not None, "an asynchronous run needs a link that can wait"
        return self._buffered(parts, asynchronous, initial).go(state, committed, until)

    def scores(self, examples: list[Example]) -> Scores:
        """Figures of the model as it stands; none without examples."""
        job, loaded = self.job, self.loaded
        if not examples:
            return {}
        found = evaluate(
            loaded.base.model,
            examples,
            task=job.model.task,
            pad_id=loaded.processor.pad_id,
            batch_size=job.evaluation.batch_size,
        )
        if job.evaluation.exact_match:
            matched = exact_match(
                loaded.base.model,
                loaded.processor.tokenizer,
                examples,
                pad_id=loaded.processor.pad_id,
                max_new_tokens=job.evaluation.max_new_tokens,
            )
            if matched is not None:
                found["exact_match"] = matched
        return finite(found)

    def base_scores(self) -> Scores:
        """Figures of the base model alone on the server's test data."""
        self.hold(self.loaded.initial)
        with self.loaded.adapted.base_only():
            return self.scores(self.loaded.data.test)

    def hold(self, adapter: AdapterState) -> None:
        """Puts a global adapter into the model."""
        self.loaded.adapted.rerank(adapter.spec)
        self.loaded.adapted.fold(())
        self.loaded.adapted.load(adapter.tensors)

    def _settings(self, least: int) -> RoundSettings:
        job, federation = self.job, self.job.federation
        return RoundSettings(
            seed=job.run.seed,
            rounds=federation.rounds,
            clients_per_round=federation.clients_per_round,
            quorum=federation.quorum,
            least=least,
            deadline_s=federation.deadline_s,
            retries=federation.retries,
            local_steps=job.training.local_steps,
            optimizer_state=job.training.optimizer_state,
            evaluate_every=job.evaluation.every,
            # clients at work need the versions they started from, also after a crash
            keep_rounds=max(
                job.run.keep_rounds,
                federation.max_staleness + 2 if federation.mode == "async" else 0,
            ),
            keep_every=job.run.keep_every,
            limits=Limits(
                federation.max_update_norm,
                federation.max_examples,
                federation.weighting == "uniform",
                demand_of(job.privacy),
            ),
            compression=agreed(job.compression),
            secure_bits=federation.secure_bits,
        )

    def _buffered(self, parts: RunParts, link: AsyncLink, initial: StrategyState) -> BufferedRounds:
        federation, store = self.job.federation, parts.store

        def load_version(version: int) -> StrategyState:
            committed: Committed = store.load_round(version)
            return resume_state(committed, initial)

        return BufferedRounds(
            parts,
            link,
            BufferSettings(
                federation.buffer,
                federation.clients_per_round,
                federation.max_staleness,
                federation.server_rate,
            ),
            load_version,
        )


def finite(scores: Mapping[str, float]) -> Scores:
    """Without the figures of a diverged model that JSON cannot carry."""
    return {key: value for key, value in scores.items() if math.isfinite(value)}


def metrics_log(store: RunStore) -> MetricsLog:
    """The log of a run's events."""
    return MetricsLog(store.folder / "metrics.jsonl")
