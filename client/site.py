"""Site: one client's part of a round, from the broadcast's bytes to its update."""

import math
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from fedlora.adapter import (
    AdapterSpec,
    AdapterState,
    Tensors,
    split_name,
    trained_shapes,
    with_rank,
)
from fedlora.adapters import METHODS
from fedlora.adapters.inject import AdaptedModel
from fedlora.adapters.slots import pack, unpack
from fedlora.client.feedback import add_feedback, followed, still_owed
from fedlora.client.made import decode_made, encode_made
from fedlora.client.private import SitePrivacy, release_of
from fedlora.client.receiving import Fetch, receive
from fedlora.client.slot_choice import choose_slots, slot_freeze
from fedlora.client.state import ClientState, Memory
from fedlora.compress import round_trip
from fedlora.config.job import Job, TrainingSection
from fedlora.data.federated import ClientData
from fedlora.errors import AdapterError
from fedlora.evaluate import example_figures
from fedlora.messages import HEADS, Broadcast, ClientUpdate, RoundPlan, Start
from fedlora.models.loaded import Loaded
from fedlora.privacy.metrics import noisy_means
from fedlora.training.private import train_private
from fedlora.training.terms import Correction, ProductProximal, Proximal, TailPenalty, Term
from fedlora.training.trainer import LocalResult, LocalWork, Progress, Training, train
from fedlora.wire import decode_broadcast

Course = Generator[Training, LocalResult, ClientUpdate]


class Site:
    """One client: its name, its data and its own state; the model may be shared.

    Args:
        name: the client's name; names its random streams.
        adapted: a model of the federation's base and spec. Between two calls of `work` its
            factors mean nothing, so that sites of one process can take turns with it.
        spec: the federation's spec at full rank.
        data: the client's examples.
        training: how to train.
        task: the model's task.
        pad_id: padding token.
        seed: the run's seed.
        rounds: rounds of the run, for the learning-rate schedule.
        state: where moments, kept tensors, control variates and what coding took from
            updates live between rounds.
        privacy: what the client does for the privacy of each of its examples.
    """

    def __init__(
        self,
        name: str,
        adapted: AdaptedModel,
        spec: AdapterSpec,
        data: ClientData,
        training: TrainingSection,
        *,
        task: str,
        pad_id: int,
        seed: int,
        rounds: int,
        state: Memory,
        privacy: SitePrivacy | None = None,
    ) -> None:
        self.name = name
        self.adapted = adapted
        self.spec = spec
        self.data = data
        self.training = training
        self.task = task
        self.pad_id = pad_id
        self.seed = seed
        self.rounds = rounds
        self.state = state
        self.privacy = privacy

    def work(self, manifest: bytes, fetch: Fetch, progress: Progress | None = None) -> ClientUpdate:
        """Trains as the manifest says and returns what changed.

        Args:
            manifest: an encoded broadcast.
            fetch: digest -> bytes of a part.
            progress: called before each optimiser step with the steps done and planned, of
                the trial that chooses slots too; what it raises ends the work.

        Raises:
            AdapterError: another spec, base or basis than the server's.
            TrainingError: the loss is not finite.
            BudgetExhausted: the privacy budget does not allow another round.
            LedgerError: the privacy ledger cannot be trusted.
        """
        broadcast = self._own(manifest)
        with closing(self._course(broadcast, fetch, progress)) as course:
            try:
                training = next(course)
                while True:
                    training = course.send(self._train(training))
            except StopIteration as end:
                update: ClientUpdate = end.value
                return update

    def course(self, manifest: bytes, fetch: Fetch) -> Course:
        """The same work, but for the training, which whoever drives the course does.

        Yields each training, and is sent its result.
        """
        return self._course(self._own(manifest), fetch, None)

    def _own(self, manifest: bytes) -> Broadcast:
        broadcast = decode_broadcast(manifest)
        if broadcast.plan.client != self.name:
            raise AdapterError(
                f"the plan is for client {broadcast.plan.client!r}, this is {self.name!r}"
            )
        return broadcast

    def _course(self, broadcast: Broadcast, fetch: Fetch, progress: Progress | None) -> Course:
        if self.privacy is None:
            return self._plain_course(broadcast, fetch, progress)
        return self._private_course(self.privacy, broadcast, fetch, progress)

    def _private_course(
        self,
        privacy: SitePrivacy,
        broadcast: Broadcast,
        fetch: Fetch,
        progress: Progress | None,
    ) -> Course:
        plan = broadcast.plan
        with privacy.ledger() as ledger:
            release = release_of(plan, broadcast.start_sha256)
            made = ledger.cached(release)
            if made is None:
                events = privacy.events(plan.local_steps)
                ledger.reserve(release, events)
                update = yield from self._plain_course(broadcast, fetch, progress)
                ledger.spend(release, events, encode_made(update))
            else:
                spec = with_rank(self.spec, plan.rank)
                update = decode_made(made, broadcast, self.name, spec, len(self.data.train))
            return replace(update, privacy=privacy.statement(ledger, plan.run))

    def _plain_course(
        self, broadcast: Broadcast, fetch: Fetch, progress: Progress | None
    ) -> Course:
        plan = broadcast.plan
        spec = with_rank(self.spec, plan.rank)
        method = METHODS[spec.method]
        memory = self.state.before(plan.round)
        start = receive(broadcast, self.spec, spec, method, _group(memory, "kept"), fetch)
        held = start.adapter.tensors
        sent = self._sent(plan, spec)
        remembered = _group(memory, "control")
        terms, own_control = self._terms(plan, start, sent, remembered)
        masks: tuple[int, ...] | None = None
        trial = 0
        if plan.slots:
            masks, trial = yield from self._choose_slots(plan, start, progress)
            terms.append(slot_freeze(spec, plan.factors, masks, held))
        moments = _group(memory, "moments") if plan.optimizer_state == "keep" else {}
        training = self._training(plan, start, terms, plan.local_steps, "data", progress, moments)
        result = yield training
        trained = result.trained
        delta = {name: trained[name] - held[name] for name in sent}
        control = self._new_control(plan, start, delta, own_control, result.rate_sum)
        control_change = {name: control[name] - own_control[name] for name in control}
        if not plan.coding.plain:
            control = followed(own_control, control_change, plan.coding)
        owed = _group(memory, "feedback") if plan.feedback else {}
        delta = add_feedback(delta, owed)
        if plan.feedback:
            owed = still_owed(delta, self._received(plan, spec, delta, masks), owed)
        # a factor that is not trained this round keeps its control variate
        self._remember(plan, spec, trained, result.moments, {**remembered, **control}, owed)
        if masks is not None:
            delta = pack(delta, spec, plan.sent, masks)
        metrics: dict[str, float] = {}
        if self.privacy is None:
            metrics["num_tokens"] = float(result.count)
        else:
            after = replace(training, start=AdapterState(spec, trained))
            metrics.update(self._noisy_figures(self.privacy, plan, after))
        if trial:
            metrics["trial_steps"] = float(trial)
        if result.loss is not None:
            metrics["train_loss"] = result.loss
        return ClientUpdate(
            run=plan.run,
            round=plan.round,
            attempt=plan.attempt,
            client=self.name,
            start_sha256=broadcast.start_sha256,
            delta=AdapterState(spec, delta),
            num_examples=len(self.data.train),
            metrics=metrics,
            control=control_change,
            slots=masks,
            coding=plan.coding,
        )

    def _received(
        self, plan: RoundPlan, spec: AdapterSpec, delta: Tensors, masks: Sequence[int] | None
    ) -> dict[str, Tensor]:
        """What the server makes of `delta`, at full rank."""
        if masks is None:
            return round_trip(delta, plan.coding)
        packed = round_trip(pack(delta, spec, plan.sent, masks), plan.coding)
        return unpack(packed, spec, plan.sent, masks)

    def _training(
        self,
        plan: RoundPlan,
        start: Start,
        terms: Sequence[Term],
        steps: int,
        stream: str,
        progress: Progress | None,
        moments: Tensors,
    ) -> Training:
        work = LocalWork(
            factors=plan.factors,
            steps=steps,
            first_step=(plan.round - 1) * plan.local_steps,
            total_steps=self.rounds * plan.local_steps,
            seed=self.seed,
            client=self.name,
            round=plan.round,
            stream=stream,
            rates=plan.rates,
            terms=terms,
            progress=progress,
        )
        mechanism = None if self.privacy is None else self.privacy.mechanism(plan)
        return Training(start.adapter, start.fold, self.data.train, work, moments, mechanism)

    def _train(self, training: Training) -> LocalResult:
        """Does a training with the site's own model."""
        if training.mechanism is not None:
            return train_private(
                self.adapted, training, self.training, task=self.task, pad_id=self.pad_id
            )
        training.put(self.adapted)
        return train(
            self.adapted,
            self.data.train,
            training.work,
            self.training,
            task=self.task,
            pad_id=self.pad_id,
            moments=training.moments,
        )

    def _noisy_figures(
        self, privacy: SitePrivacy, plan: RoundPlan, after: Training
    ) -> Mapping[str, float]:
        """What the client may say of its validation under privacy.

        Args:
            after: begins with what was trained.
        """
        if privacy.section.metrics == "none" or not self.data.validation:
            return {}
        # others may have had the model since
        after.put(self.adapted)
        losses, correct = example_figures(
            self.adapted.model, self.data.validation, task=self.task, pad_id=self.pad_id
        )
        return noisy_means(
            losses, correct, privacy.section.metrics_noise, privacy.source(plan, "metrics")
        )

    def _sent(self, plan: RoundPlan, spec: AdapterSpec) -> list[str]:
        heads = {} if HEADS in plan.kept else spec.head_shapes
        shapes = trained_shapes(replace(spec, head_shapes=heads), METHODS[spec.method], plan.sent)
        return list(shapes)

    def _terms(
        self, plan: RoundPlan, start: Start, sent: Sequence[str], own: Tensors
    ) -> tuple[list[Term], dict[str, Tensor]]:
        """The plan's terms, and the client's own control variates (zero at first)."""
        held, layers = start.adapter.tensors, start.adapter.spec.layers
        terms: list[Term] = []
        if plan.proximal and plan.proximal_product:
            terms.append(ProductProximal(plan.proximal, held, layers))
        elif plan.proximal:
            terms.append(Proximal(plan.proximal, held))
        if plan.tail_weight:
            terms.append(TailPenalty(plan.tail_weight, plan.tail_slot, layers))
        control: dict[str, Tensor] = {}
        if plan.control:
            control = {
                name: own[name] if name in own else torch.zeros_like(start.control[name])
                for name in sent
            }
            terms.append(Correction({n: start.control[n] - control[n] for n in sent}))
        return terms, control

    def _new_control(
        self,
        plan: RoundPlan,
        start: Start,
        delta: Tensors,
        own: Tensors,
        rate_sum: float,
    ) -> dict[str, Tensor]:
        """c_i - c + (start - trained) / sum of rates: option II of SCAFFOLD's algorithm 1."""
        if not plan.control or not rate_sum:
            return dict(own)
        new = {}
        for name, value in own.items():
            rate = rate_sum * plan.rates.get(split_name(name)[1], 1.0)
            # a tensor that was not to move says nothing of its gradient
            new[name] = value - start.control[name] - delta[name] / rate if rate else value
        return new

    def _choose_slots(
        self, plan: RoundPlan, start: Start, progress: Progress | None
    ) -> Generator[Training, LocalResult, tuple[tuple[int, ...], int]]:
        """The slots to train, from a trial whose result is thrown away; and its steps."""
        steps = plan.trial_steps or math.ceil(
            len(self.data.train) / (self.training.batch_size * self.training.accumulation)
        )
        result = yield self._training(plan, start, (), steps, "trial", progress, {})
        spec, held = start.adapter.spec, start.adapter.tensors
        return choose_slots(spec, plan.factors, held, result.trained, plan.slots), steps

    def _remember(
        self,
        plan: RoundPlan,
        spec: AdapterSpec,
        trained: Tensors,
        moments: Tensors,
        control: Tensors,
        owed: Tensors,
    ) -> None:
        memory = {f"control.{name}": value for name, value in control.items()}
        memory.update({f"feedback.{name}": value for name, value in owed.items()})
        if plan.optimizer_state == "keep":
            memory.update({f"moments.{name}": value for name, value in moments.items()})
        for name in plan.kept:
            own = (
                spec.head_shapes
                if name == HEADS
                else trained_shapes(replace(spec, head_shapes={}), METHODS[spec.method], [name])
            )
            memory.update({f"kept.{n}": trained[n] for n in own})
        if memory:
            self.state.save(plan.round, memory)


def _group(memory: Tensors, name: str) -> dict[str, Tensor]:
    """The tensors of one group of what the client remembers."""
    prefix = f"{name}."
    return {k.removeprefix(prefix): v for k, v in memory.items() if k.startswith(prefix)}


def site_for(
    job: Job,
    loaded: Loaded,
    name: str,
    data: ClientData,
    folder: Path,
    privacy: SitePrivacy | None = None,
) -> Site:
    """The client `name` of a job.

    Args:
        loaded: the job's model; may be shared with other clients of this process.
        data: the client's examples.
        folder: where it keeps what it needs from round to round; named after the client.
        privacy: see `Site`.
    """
    return site_with(job, loaded, name, data, ClientState(folder), privacy)


def site_with(
    job: Job,
    loaded: Loaded,
    name: str,
    data: ClientData,
    state: Memory,
    privacy: SitePrivacy | None = None,
) -> Site:
    """The client `name` of a job, which keeps in `state` what it needs from round to round."""
    return Site(
        name,
        loaded.adapted,
        loaded.initial.spec,
        data,
        job.training,
        task=job.model.task,
        pad_id=loaded.processor.pad_id,
        seed=job.run.seed,
        rounds=job.federation.rounds,
        state=state,
        privacy=privacy,
    )
