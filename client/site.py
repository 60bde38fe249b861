"""Site: one client's part of a round, from the broadcast's bytes to its update."""

from collections.abc import Callable
from dataclasses import replace

from fedlora.adapter import AdapterSpec, AdapterState, tensors_digest, trained_shapes, with_rank
from fedlora.adapters.inject import AdaptedModel
from fedlora.client.state import ClientState
from fedlora.config.job import TrainingSection
from fedlora.data.federated import ClientData
from fedlora.errors import AdapterError
from fedlora.messages import Broadcast, ClientUpdate
from fedlora.training.trainer import LocalWork, train
from fedlora.wire import decode_broadcast, decode_part

Fetch = Callable[[str], bytes]


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
        state: where optimiser moments live between rounds.
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
        state: ClientState,
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

    def work(self, manifest: bytes, fetch: Fetch) -> ClientUpdate:
        """Trains as the manifest says and returns what changed.

        Args:
            manifest: an encoded broadcast.
            fetch: digest -> bytes of a part.

        Raises:
            AdapterError: another spec, base or basis than the server's.
            TrainingError: the loss is not finite.
        """
        broadcast = decode_broadcast(manifest)
        plan = broadcast.plan
        if plan.client != self.name:
            raise AdapterError(f"the plan is for client {plan.client!r}, this is {self.name!r}")
        spec = with_rank(self.spec, plan.rank) if plan.rank != self.spec.rank else self.spec
        start = self._receive(broadcast, spec, fetch)
        self.adapted.rerank(spec)
        self.adapted.load(start.tensors)
        keep = plan.optimizer_state == "keep"
        result = train(
            self.adapted,
            self.data.train,
            LocalWork(
                factors=plan.factors,
                steps=plan.local_steps,
                first_step=(plan.round - 1) * plan.local_steps,
                total_steps=self.rounds * plan.local_steps,
                seed=self.seed,
                client=self.name,
                round=plan.round,
            ),
            self.training,
            task=self.task,
            pad_id=self.pad_id,
            moments=self.state.before(plan.round) if keep else None,
        )
        if keep:
            self.state.save(plan.round, result.moments)
        trained = self.adapted.state().tensors
        sent = trained_shapes(spec, self.adapted.method, plan.factors)
        delta = AdapterState(spec, {k: trained[k] for k in sent}) - AdapterState(
            spec, {k: start.tensors[k] for k in sent}
        )
        metrics = {"num_tokens": float(result.count)}
        if result.loss is not None:
            metrics["train_loss"] = result.loss
        return ClientUpdate(
            run=plan.run,
            round=plan.round,
            attempt=plan.attempt,
            client=self.name,
            start_sha256=broadcast.start_sha256,
            delta=delta,
            num_examples=len(self.data.train),
            metrics=metrics,
        )

    def _receive(self, broadcast: Broadcast, spec: AdapterSpec, fetch: Fetch) -> AdapterState:
        if broadcast.spec_digest != spec.digest():
            raise AdapterError(
                f"the server's adapter spec is {broadcast.spec_digest[:12]}, this client's is "
                f"{spec.digest()[:12]}; both must hold the same base model, method, rank, "
                "targets and basis"
            )
        method = self.adapted.method
        layers = spec.layers
        tensors = {}
        for part, digest in broadcast.parts.items():
            if part == "basis":
                basis = decode_part(fetch(digest), digest, method.basis_shapes(self.spec.layers))
                if tensors_digest(basis) != spec.basis_digest:
                    raise AdapterError(
                        "the frozen basis that the server sent is not the one its spec names"
                    )
                continue
            if part == "heads":
                shapes = dict(spec.head_shapes)
            else:
                factor = part.removeprefix("factor.")
                shapes = trained_shapes(replace(spec, head_shapes={}), method, [factor])
                if not layers or not shapes:
                    raise AdapterError(f"the broadcast has an unknown part {part[:64]!r}")
            tensors.update(decode_part(fetch(digest), digest, shapes))
        missing = trained_shapes(spec, method).keys() - tensors.keys()
        if missing:
            raise AdapterError(f"the broadcast lacks {', '.join(sorted(missing)[:3])}")
        return AdapterState(spec, tensors)
