"""A federation without a model: clients that pull every factor towards their own target.

Only the clients are made up; strategy, gate, spool, rounds and run folder are the real ones,
and everything crosses the link as bytes.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from fedlora.adapter import AdapterState, trained_shapes, with_rank
from fedlora.adapters import METHODS
from fedlora.adapters.slots import pack, top_slots
from fedlora.checkpoint import RunStore
from fedlora.messages import HEADS, ClientUpdate, Coding, Start, part_coding
from fedlora.seeds import generator
from fedlora.server.admission import Limits
from fedlora.server.handout import split_parts
from fedlora.server.link import Reply
from fedlora.server.rounds import resume_state, run_rounds
from fedlora.server.run_parts import RoundSettings, RunParts
from fedlora.strategies import STRATEGIES
from fedlora.strategies.base import ClientInfo
from fedlora.wire import decode_broadcast, decode_part, encode_update
from tests.server.cases import make_spec, random_state, with_basis

NAMES = ("ann", "bob", "cyd", "dan")


def honest(client, plan, start, sent):
    """Half of the way to a target that only depends on the client and the tensor's name."""
    return {
        name: 0.5
        * (torch.randn(start[name].shape, generator=generator(0, client, name)) - start[name])
        for name in sent
    }


@dataclass
class ToyLink:
    """A link whose clients answer in the order and with the replies that a test wants."""

    spec: object
    ranks: dict[str, int]
    order: Callable = list
    twist: Callable = lambda reply, plan: [reply]
    change: Callable = lambda update: update
    manifests: list = field(default_factory=list)

    def roster(self):
        return [ClientInfo(name, rank) for name, rank in sorted(self.ranks.items())]

    def exchange(self, tasks, parts, deadline_s):
        for task in self.order(tasks):
            plan = decode_broadcast(task.manifest).plan
            self.manifests.append(task.manifest)
            yield from self.twist(self.answer(task, parts), plan)

    def answer(self, task, parts):
        broadcast = decode_broadcast(task.manifest)
        plan, method = broadcast.plan, METHODS[self.spec.method]
        spec = with_rank(self.spec, plan.rank)
        shapes = trained_shapes(spec, method)
        start = {}
        for part, digest in broadcast.parts.items():
            if part.startswith("fold."):
                continue  # these clients have no base to fold into
            names = split_parts(Start(AdapterState(spec, dict.fromkeys(shapes))), {})[part]
            coding = part_coding(part, Coding(plan.down))
            start |= decode_part(
                parts[digest], digest, {name: shapes[name] for name in names}, coding
            )
        heads = {} if HEADS in plan.kept else spec.head_shapes
        sent = trained_shapes(replace(spec, head_shapes=heads), method, plan.sent)
        delta = honest(plan.client, plan, start, sent)
        masks = None
        if plan.slots:
            scores = {x.name: torch.arange(x.rank, dtype=torch.float64) for x in spec.layers}
            masks = top_slots(scores, spec, plan.slots)
            delta = pack(delta, spec, plan.sent, masks)
        update = ClientUpdate(
            run=plan.run,
            round=plan.round,
            attempt=plan.attempt,
            client=plan.client,
            start_sha256=broadcast.start_sha256,
            delta=AdapterState(spec, delta),
            num_examples=10.0 + sum(plan.client.encode()) % 7,
            metrics={"train_loss": 1.0},
            slots=masks,
            coding=plan.coding,
        )
        manifest, payload = encode_update(self.change(update))
        return Reply(plan.client, manifest, payload, len(task.manifest), 1.0)


class Run:
    """A toy run in a folder; keyword arguments change the round settings."""

    def __init__(self, folder: Path, strategy="fedit", method="lora", ranks=None, **settings):
        rank = max(ranks) if ranks else 2
        if strategy == "fed-sb":
            method = "lora-xs"
        self.spec, self.basis = with_basis(make_spec(method, rank))
        self.link = ToyLink(self.spec, dict(zip(NAMES, ranks or (2,) * 4, strict=True)))
        kind = STRATEGIES[strategy] if isinstance(strategy, str) else strategy
        self.strategy = kind(METHODS[method])
        self.events = []
        self.evaluate = None
        limits = Limits(1e4, 1e7)
        self.settings = RoundSettings(
            **{
                "seed": 0,
                "rounds": 3,
                "clients_per_round": None,
                "quorum": None,
                "deadline_s": 60.0,
                "retries": 1,
                "local_steps": 1,
                "optimizer_state": "reset",
                "evaluate_every": 1,
                "keep_rounds": 2,
                "keep_every": 10,
                "limits": limits,
                **settings,
            }
        )
        initial = self.strategy.init(random_state(self.spec))
        self.store = RunStore.create(
            folder, "", "job", initial.tensors, {"run": "toy", "extra": {}, "events": []}
        )

    def go(self, until=None):
        initial = self.strategy.init(random_state(self.spec))
        return run_rounds(self.parts(), resume_state(self.store.load(), initial), until)

    def parts(self):
        return RunParts(
            run="toy",
            store=self.store,
            link=self.link,
            strategy=self.strategy,
            method=METHODS[self.spec.method],
            basis=self.basis,
            sent_basis={},
            settings=self.settings,
            evaluate=self.evaluate,
            emit=self.events.append,
        )

    def change_settings(self, **settings):
        self.settings = replace(self.settings, **settings)

    def rounds(self):
        return [event for event in self.events if event["event"] == "round"]
