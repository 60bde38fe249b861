"""A run whose process is killed again and again, and a checker of what is left.

The child is forked, so that a trial costs milliseconds: it opens the run folder and drives the
real round loop with clients whose updates are a fixed function of round and name. It kills
itself (kill -9) at a random one of its next writes, syncs and renames: before it, after it, or
with half of the bytes written.
Every round that the loop reports as committed is written to a log of the harness's own, outside
the run folder; a checker compares the two.
"""

import dataclasses
import itertools
import json
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path

import torch

from fedlora.adapter import (
    AdapterSpec,
    AdapterState,
    LayerSpec,
    tensors_digest,
    trained_shapes,
)
from fedlora.adapters import METHODS
from fedlora.checkpoint import Committed, RunStore
from fedlora.config.job import ScenarioSection
from fedlora.errors import FedloraError
from fedlora.messages import ClientUpdate
from fedlora.seeds import generator
from fedlora.server.admission import Limits
from fedlora.server.rounds import resume_state, run_rounds
from fedlora.server.run_parts import RoundSettings, RunParts
from fedlora.simulation.local import LocalLink
from fedlora.simulation.scenario import Scenario
from fedlora.strategies import STRATEGIES
from fedlora.wire import decode_broadcast, decode_own, encode_tensors

ROUNDS = 20
CLIENTS = ("a", "b", "c")
SPEC = AdapterSpec(
    method="lora",
    rank=64,
    alpha=64.0,
    # about 2 MB of factors
    layers=tuple(LayerSpec(f"layer{i}", 1024, 1024, 64, 1.0) for i in range(4)),
    heads=(),
    head_shapes={},
    base_fingerprint="base",
    seed=0,
)
SHAPES = trained_shapes(SPEC, METHODS["lora"])

Open = Callable[[Path], RunStore]


class NaiveStore(RunStore):
    """How a store is usually written: files in place, without order and without digests."""

    def commit(self, number, tensors, record):
        _overwrite(self.folder / "record.json", json.dumps({**record, "round": number}).encode())
        _overwrite(self.folder / "global.safetensors", encode_tensors(tensors))

    def load(self):
        record = json.loads((self.folder / "record.json").read_text())
        tensors = decode_own((self.folder / "global.safetensors").read_bytes())
        return Committed(record["round"], tensors, record)

    def prune(self, head, keep, every):
        pass


def _overwrite(path: Path, data: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.write(descriptor, data)
    os.close(descriptor)


def initial() -> AdapterState:
    """The adapter before round 1."""
    draws = {
        name: torch.randn(shape, generator=generator(0, name)) for name, shape in SHAPES.items()
    }
    return AdapterState(SPEC, draws)


def create(folder: Path, kind: type[RunStore]) -> None:
    """A run folder with round 0."""
    record = {"run": "lineage", "extra": {}, "events": []}
    RunStore.create(folder, "", "digest", initial().tensors, record).close()
    if kind is NaiveStore:
        naive = NaiveStore.open(folder, "digest")
        naive.commit(0, initial().tensors, record)
        naive.close()


def work(client: str, manifest: bytes, fetch: Callable[[str], bytes]) -> ClientUpdate:
    """An update that depends on round and client alone; no training."""
    broadcast = decode_broadcast(manifest)
    plan = broadcast.plan
    size = torch.rand(1, generator=generator(7, client, plan.round))
    delta = {name: size.expand(shape).clone() for name, shape in SHAPES.items()}
    return ClientUpdate(
        run=plan.run,
        round=plan.round,
        attempt=plan.attempt,
        client=client,
        start_sha256=broadcast.start_sha256,
        delta=AdapterState(SPEC, delta),
        num_examples=10.0,
    )


def drive(folder: Path, kind: type[RunStore], acknowledged: Path) -> str:
    """Runs from whatever is committed to the end; returns the last adapter's digest."""
    store = kind.open(folder, "digest")
    method = METHODS["lora"]
    strategy = STRATEGIES["fedit"](method)
    scenario = Scenario(ScenarioSection(), CLIENTS, rank=64, seed=0, max_update_norm=1e9)
    last = {}

    def emit(event):
        if event["event"] == "round":
            last.update(event)
            with acknowledged.open("a") as file:
                file.write(f"{event['round']} {event['adapter_sha256']}\n")

    parts = RunParts(
        run="lineage",
        store=store,
        link=LocalLink(scenario, work),
        # the meter is not what is under test here
        strategy=strategy,
        method=_Unmeasured(method),
        basis={},
        sent_basis={},
        settings=RoundSettings(
            seed=0,
            rounds=ROUNDS,
            clients_per_round=None,
            quorum=None,
            deadline_s=1e9,
            retries=0,
            local_steps=1,
            optimizer_state="reset",
            evaluate_every=1,
            keep_rounds=2,
            keep_every=10,
            limits=Limits(1e9, 1e7),
        ),
        evaluate=None,
        emit=emit,
    )
    try:
        run_rounds(parts, resume_state(store.load(), strategy.init(initial())))
    finally:
        store.close()
    return last.get("adapter_sha256", "")


class _Unmeasured:
    """LoRA without a low-rank form, so that the aggregation error is skipped."""

    def __init__(self, method):
        self._method = method
        self.affine = False

    def __getattr__(self, name):
        return getattr(self._method, name)

    def lowrank(self, layer, factors, basis):
        return None


@dataclasses.dataclass
class Trial:
    """What came out of one run that was killed on its way.

    Attributes:
        kills: times the process was killed.
        problem: what broke, or an empty string.
        sha256: digest of the final adapter.
    """

    kills: int
    problem: str
    sha256: str


def run_trial(folder: Path, kind: type[RunStore], seed: int, longest: int = 40) -> Trial:
    """Kills the run at random operations until it gets through.

    Args:
        folder: where the run folder goes.
        kind: the store under test.
        seed: of the kills.
        longest: a process is killed within so many writes, syncs and renames.
    """
    chance = random.Random(seed)
    create(folder, kind)
    acknowledged = folder.with_name(folder.name + ".acknowledged")
    acknowledged.touch()
    kills = 0
    while True:
        point, moment = chance.randint(1, longest), chance.choice(("before", "half", "after"))
        child = os.fork()
        if child == 0:
            code = 1
            try:
                _arm(point, moment)
                drive(folder, kind, acknowledged)
                code = 0
            except (FedloraError, ValueError, KeyError):
                code = 2
            finally:
                os._exit(code)
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            kills += 1
        elif os.waitstatus_to_exitcode(status) == 0:
            break
        else:
            return Trial(kills, "the folder could not be resumed", "")
    lines = [line.split() for line in acknowledged.read_text().splitlines()]
    seen: dict[int, set[str]] = {}
    for number, digest in lines:
        seen.setdefault(int(number), set()).add(digest)
    if any(len(digests) > 1 for digests in seen.values()):
        return Trial(kills, "a round was committed with two outcomes", "")
    numbers = [int(number) for number, _ in lines]
    if any(later <= earlier for earlier, later in itertools.pairwise(numbers)):
        return Trial(kills, "an acknowledged round was done again", "")
    store = kind.open(folder, "digest")
    final = store.load()
    store.close()
    if final.round != ROUNDS:
        return Trial(kills, "the last round is missing", "")
    return Trial(kills, "", tensors_digest(final.tensors))


def _arm(point: int, moment: str) -> None:
    """Kills this process at its `point`-th write, sync or rename."""
    count = 0

    def deadly(name: str) -> None:
        real = getattr(os, name)

        def call(*args):
            nonlocal count
            count += 1
            if count != point:
                return real(*args)
            if moment == "half" and name in ("write", "pwrite"):
                data = bytes(args[1])
                real(args[0], data[: len(data) // 2], *args[2:])
            elif moment == "after":
                real(*args)
            os.kill(os.getpid(), signal.SIGKILL)
            raise AssertionError("unreachable")

        setattr(os, name, call)

    for name in ("write", "pwrite", "fsync", "rename"):
        deadly(name)
