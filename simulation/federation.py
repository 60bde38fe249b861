"""Federation: a job made real on this machine, and the runs that are made of it."""

import dataclasses
import math
import platform
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fedlora.adapter import AdapterSpec, AdapterState, trained_shapes
from fedlora.adapters import METHODS
from fedlora.adapters.files import load_adapter
from fedlora.adapters.inject import AdaptedModel, adapt
from fedlora.adapters.targets import find_targets
from fedlora.checkpoint import RunStore
from fedlora.client.site import Site
from fedlora.client.state import ClientState
from fedlora.compress import agreed
from fedlora.config.job import AdapterSection, Job
from fedlora.config.load import dump_job
from fedlora.data.example import Example
from fedlora.data.federated import ClientData, FederatedData, load_federated
from fedlora.errors import ConfigError, RunFolderError
from fedlora.evaluate import evaluate, exact_match
from fedlora.messages import ClientUpdate
from fedlora.models.loading import BaseModel, Processor, load_base, load_processor
from fedlora.server.admission import Limits
from fedlora.server.buffered import BufferedRounds, BufferSettings
from fedlora.server.link import Link
from fedlora.server.rounds import resume_state, run_rounds
from fedlora.server.run_parts import Event, RoundSettings, RunParts
from fedlora.simulation.local import LocalLink
from fedlora.simulation.metrics import MetricsLog
from fedlora.simulation.scenario import Scenario
from fedlora.strategies.base import Conditions, Strategy, StrategyState
from fedlora.strategies.plugin import begin, check_strategy, make_strategy
from fedlora.wire import encode_json

Emit = Callable[[Event], None]
Scores = dict[str, float]


@dataclass(frozen=True)
class Loaded:
    """What several runs of one comparison share: base model, adapter slots and data."""

    processor: Processor
    data: FederatedData
    base: BaseModel
    adapted: AdaptedModel
    initial: AdapterState


def load(job: Job) -> Loaded:
    """Loads model and data and attaches a fresh adapter.

    Raises:
        ConfigError, DataError, ModelError, AdapterError: bad input, all with exit code 2.
    """
    _check_device(job.run.device)
    # before minutes of loading
    make_strategy(job.federation, METHODS[job.adapter.method]).check_method()
    torch.set_num_threads(job.run.threads)
    processor = load_processor(job.model)
    data = load_federated(
        job.data,
        job.partition,
        job.model.task,
        tokenizer=processor.tokenizer,
        image_processor=processor.image_processor,
        seed=job.run.seed,
    )
    base = load_base(
        job.model,
        labels=data.labels,
        pad_id=processor.pad_id,
        seed=job.run.seed,
        heads=None if job.adapter.heads == "auto" else job.adapter.heads,
        device=job.run.device,
    )
    _check_length(job, base)
    section = job.adapter
    if section.start is not None:
        adapted = _continued(base, section, data.labels)
    else:
        adapted = adapt(
            base.model,
            method=section.method,
            rank=section.rank,
            alpha=section.alpha,
            targets=section.targets,
            heads=base.heads,
            base_fingerprint=base.fingerprint,
            seed=job.run.seed,
            dropout=section.dropout,
            options=section.options,
        )
    return Loaded(processor, data, base, adapted, adapted.state())


def _check_device(device: str) -> None:
    try:
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as e:
        reason = str(e).splitlines()[0]
        raise ConfigError(
            f"run.device = {device!r} cannot be used here: {reason}; choose cpu, or a cuda device "
            "that torch finds"
        ) from e


def _check_length(job: Job, base: BaseModel) -> None:
    config = base.model.config
    for name in ("max_position_embeddings", "n_positions"):
        longest = getattr(config, name, None)
        if isinstance(longest, int) and job.data.max_length > longest:
            raise ConfigError(
                f"data.max_length = {job.data.max_length} is more than the {longest} positions of "
                f"the model; choose at most {longest}"
            )


def _continued(base: BaseModel, section: AdapterSection, labels: tuple[str, ...]) -> AdaptedModel:
    assert section.start is not None
    folder = Path(section.start)
    start = load_adapter(folder)
    spec = start.spec
    asked = (section.method, section.rank, section.alpha or spec.alpha)
    if asked != (spec.method, spec.rank, spec.alpha):
        raise ConfigError(
            f"adapter.start = {str(folder)!r} holds a {spec.method} adapter of rank {spec.rank} "
            f"and alpha {spec.alpha:g}, the job asks for {asked[0]}, {asked[1]} and {asked[2]:g}; "
            f'set adapter.method = "{spec.method}", adapter.rank = {spec.rank} and '
            f"adapter.alpha = {spec.alpha:g}"
        )
    if start.labels != labels:
        raise ConfigError(
            f"adapter.start = {str(folder)!r} was trained on the classes "
            f"{', '.join(start.labels)}, the data have {', '.join(labels)}; the head needs the "
            "same classes in the same order (data.labels)"
        )
    if spec.heads != base.heads:
        raise ConfigError(
            f"adapter.start = {str(folder)!r} has the heads {list(spec.heads)}, this job trains "
            f"{list(base.heads)}; set adapter.heads to those of the adapter"
        )
    names = find_targets(base.model, section.targets, base.heads)
    if sorted(names) != [layer.name for layer in spec.layers]:
        raise ConfigError(
            f"adapter.start = {str(folder)!r} adapts {len(spec.layers)} layers, adapter.targets "
            f"matches {len(names)}; set adapter.targets to the layers of the adapter"
        )
    adapted = AdaptedModel.from_spec(
        base.model, start.spec, base.fingerprint, start.basis or None, section.dropout
    )
    adapted.load(start.tensors)
    return adapted


class Federation:
    """One run: its job, its clients and its folder.

    Args:
        job: the run's job.
        loaded: model and data.
        clients: which clients take part, with their data; by default all of `loaded`.
        emit: receives every event, besides metrics.jsonl.
        progress: called with a client's name when its work begins.
    """

    def __init__(
        self,
        job: Job,
        loaded: Loaded,
        *,
        clients: Mapping[str, ClientData] | None = None,
        emit: Emit | None = None,
        progress: Callable[[str], None] | None = None,
    ) -> None:
        self.job = job
        self.loaded = loaded
        self.clients = dict(sorted((clients or loaded.data.clients).items()))
        self.emit = emit or (lambda event: None)
        self.spec: AdapterSpec = loaded.initial.spec
        self.method = METHODS[self.spec.method]
        self.strategy: Strategy = make_strategy(job.federation, self.method)
        self.scenario = Scenario(
            job.scenario,
            list(self.clients),
            rank=self.spec.rank,
            seed=job.run.seed,
            max_update_norm=job.federation.max_update_norm,
        )
        check_strategy(
            self.strategy,
            Conditions(
                self.spec,
                [client.rank for client in self.scenario.clients],
                clients_per_round=job.federation.clients_per_round,
                optimizer=job.training.optimizer,
                optimizer_state=job.training.optimizer_state,
                momentum=job.training.momentum,
                asynchronous=job.federation.mode == "async",
                compression=agreed(job.compression),
            ),
        )
        federation = job.federation
        if federation.mode == "async" and federation.buffer > len(self.clients):
            raise ConfigError(
                f"federation.buffer = {federation.buffer} is more than the {len(self.clients)} "
                "clients of the federation; choose at most that"
            )
        self._local = LocalLink(self.scenario, self._work, progress)
        self.link: Link = self._local
        derived = self.method.basis_provenance == "derived"
        # what must be sent, for others cannot make it themselves
        self.sent_basis = loaded.adapted.basis if derived else {}
        self._folder = Path()

    def start(self, folder: Path) -> RunStore:
        """Creates the run folder with round 0 and reports the start.

        Raises:
            RunFolderError: the folder is not empty.
            StorageError: the disk refused.
        """
        job, loaded = self.job, self.loaded
        test = loaded.data.test
        self.hold(loaded.initial)
        with loaded.adapted.base_only():
            base_scores = self.scores(test)
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
            "num_test": len(test),
            "personal": self.strategy.personal,
            "eval": base_scores,
            "labels": list(loaded.data.labels),
            "clients": {
                info.name: {
                    "train": len(self.clients[info.name].train),
                    "validation": len(self.clients[info.name].validation),
                    "composition": self.clients[info.name].composition,
                    "rank": info.rank,
                    "hostile": list(self.scenario.kinds(info.name)),
                }
                for info in self.scenario.clients
            },
            "unusable": _unusable(loaded.data),
            "machine": machine(job.run.threads),
        }
        record = {
            "run": secrets.token_hex(8),
            "spec_digest": self.spec.digest(),
            "extra": {},
            "events": [start],
        }
        state = begin(self.strategy, loaded.initial)
        files = {"spec.json": encode_json(self.spec.to_json())}
        store = RunStore.create(folder, dump_job(job), job.digest(), state.tensors, record, files)
        self._log(store).append(start)
        self.emit(start)
        return store

    def run(self, store: RunStore, until: int | None = None) -> StrategyState:
        """Runs from the last committed round to `until` (by default the end).

        Raises:
            RunFailed: the run stopped early; see `run_rounds`.
            RunFolderError: the folder belongs to another base model or adapter.
        """
        job = self.job
        self._folder = store.folder
        committed = store.load()
        self._local.remember(store.folder / "held.json", committed.round)
        genesis = store.record(0) or committed.record
        if genesis.get("spec_digest", self.spec.digest()) != self.spec.digest():
            raise RunFolderError(
                f"{store.folder} was started with another base model or adapter than this "
                "machine makes from its job; restore the base model it was started with"
            )
        log = self._log(store)
        log.reconcile(store, committed.round)
        if store.fallback:
            self.emit({"event": "fallback", "why": store.fallback})

        def emit(event: Event) -> None:
            log.append(event)
            self.emit(event)

        if committed.round:
            emit({"event": "resume", "round": committed.round})
        federation = job.federation
        parts = RunParts(
            run=str(committed.record["run"]),
            store=store,
            link=self.link,
            strategy=self.strategy,
            method=self.method,
            basis=self.loaded.adapted.basis,
            sent_basis=self.sent_basis,
            settings=RoundSettings(
                seed=job.run.seed,
                rounds=federation.rounds,
                clients_per_round=federation.clients_per_round,
                quorum=federation.quorum,
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
                ),
                compression=agreed(job.compression),
            ),
            evaluate=self._evaluate,
            emit=emit,
        )
        initial = begin(self.strategy, self.loaded.initial)
        state = resume_state(committed, initial)
        if federation.mode == "sync":
            return run_rounds(parts, state, until)
        buffered = BufferedRounds(
            parts,
            self._local,
            BufferSettings(
                federation.buffer,
                federation.clients_per_round,
                federation.max_staleness,
                federation.server_rate,
            ),
            lambda version: resume_state(store.load_round(version), initial),
        )
        return buffered.go(state, committed, until)

    def scores(self, examples: list[Example]) -> Scores:
        """Figures of the model as it stands."""
        job, loaded = self.job, self.loaded
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
        # of a diverged model, figures that JSON cannot carry are left out
        return {key: value for key, value in found.items() if math.isfinite(value)}

    def hold(self, adapter: AdapterState) -> None:
        """Puts a global adapter into the model."""
        self.loaded.adapted.rerank(adapter.spec)
        self.loaded.adapted.fold(())
        self.loaded.adapted.load(adapter.tensors)

    def personal(self, client: str, adapter: AdapterState, number: int) -> AdapterState:
        """The adapter of one client after round `number`: the global one but for its own part."""
        memory = ClientState(self._folder / "clients" / client).before(number + 1)
        kept = {
            name: tensor
            for key, tensor in memory.items()
            if (name := key.removeprefix("kept.")) != key
        }
        return AdapterState(adapter.spec, {**adapter.tensors, **kept})

    def global_scores(self, adapter: AdapterState, number: int) -> Scores:
        """Figures after round `number` on the global test data.

        Of the adapter; or, for a personal strategy, the mean over all clients' own adapters.
        """
        test = self.loaded.data.test
        if not self.strategy.personal:
            self.hold(adapter)
            return self.scores(test)
        found = []
        for name in self.clients:
            self.hold(self.personal(name, adapter, number))
            found.append(self.scores(test))
        shared = set.intersection(*(set(scores) for scores in found))
        return {key: sum(s[key] for s in found) / len(found) for key in sorted(shared)}

    def _evaluate(self, state: StrategyState, adapter: AdapterState) -> Mapping[str, float]:
        return self.global_scores(adapter, state.round)

    def _work(self, client: str, manifest: bytes, fetch: Callable[[str], bytes]) -> ClientUpdate:
        data = self.clients[client]
        poisoned = self.scenario.poison(client, data.train, len(self.loaded.data.labels))
        site = Site(
            client,
            self.loaded.adapted,
            self.spec,
            dataclasses.replace(data, train=poisoned),
            self.job.training,
            task=self.job.model.task,
            pad_id=self.loaded.processor.pad_id,
            seed=self.job.run.seed,
            rounds=self.job.federation.rounds,
            state=ClientState(self._folder / "clients" / client),
        )
        return site.work(manifest, fetch)

    def _log(self, store: RunStore) -> MetricsLog:
        return MetricsLog(store.folder / "metrics.jsonl")


def machine(threads: int) -> dict[str, Any]:
    """What the figures depend on besides the job."""
    return {
        "processor": _processor(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": threads,
    }


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _unusable(data: FederatedData) -> dict[str, Any]:
    """Counts by reason, and where the first rows of each reason came from."""
    first = {reason: origins[:5] for reason, origins in data.unusable.dropped.items()}
    return {"counts": data.unusable.counts, "first": first}
