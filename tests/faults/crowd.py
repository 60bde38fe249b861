"""One round with many clients and large updates, in a process of its own; prints its peak memory.

python -m tests.faults.crowd FOLDER CLIENTS LAYERS
"""

import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from fedlora.adapter import AdapterState, LayerSpec, trained_shapes
from fedlora.adapters import METHODS
from fedlora.checkpoint import RunStore
from fedlora.messages import ClientUpdate
from fedlora.server.admission import Limits
from fedlora.server.link import Reply, Task
from fedlora.server.rounds import resume_state, run_rounds
from fedlora.server.run_parts import RoundSettings, RunParts
from fedlora.strategies import STRATEGIES
from fedlora.strategies.base import ClientInfo
from fedlora.wire import decode_broadcast, encode_update
from tests.faults.crash import SPEC
from tests.faults.exchange_process import status_bytes

ROOT = Path(__file__).parents[2]


class CrowdLink:
    """Clients of equal updates; each reply is made when it is asked for, in memory of its own."""

    def __init__(self, spec, clients: int) -> None:
        self.spec = spec
        self.names = [f"client-{place:03d}" for place in range(clients)]

    def roster(self) -> Sequence[ClientInfo]:
        return [ClientInfo(name, self.spec.rank) for name in self.names]

    def exchange(
        self, tasks: Sequence[Task], parts: Mapping[str, bytes], deadline_s: float
    ) -> Iterator[Reply]:
        shapes = trained_shapes(self.spec, METHODS["lora"])
        for number, task in enumerate(tasks):
            broadcast = decode_broadcast(task.manifest)
            plan = broadcast.plan
            delta = {name: torch.full(shape, 1e-3 * number) for name, shape in shapes.items()}
            update = ClientUpdate(
                run=plan.run,
                round=plan.round,
                attempt=plan.attempt,
                client=plan.client,
                start_sha256=broadcast.start_sha256,
                delta=AdapterState(self.spec, delta),
                num_examples=10.0,
            )
            yield Reply(plan.client, *encode_update(update), 0, 0.0)


def peak_bytes(folder: Path, clients: int, layers: int) -> int:
    """Largest resident size of a server's process in a round with so many clients.

    Args:
        layers: of the adapter; each takes 0.5 MiB.
    """
    command = [sys.executable, "-m", "tests.faults.crowd", str(folder), str(clients), str(layers)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return int(done.stdout)


def main(folder: Path, clients: int, layers: int) -> None:
    torch.set_num_threads(1)
    spec = replace(
        SPEC, layers=tuple(LayerSpec(f"l{i:03d}", 1024, 1024, 64, 1.0) for i in range(layers))
    )
    strategy = STRATEGIES["fedit"](METHODS["lora"])
    shapes = trained_shapes(spec, METHODS["lora"])
    initial = strategy.init(AdapterState(spec, {k: torch.zeros(v) for k, v in shapes.items()}))
    record = {"run": "crowd", "extra": {}, "events": []}
    store = RunStore.create(folder, "", "digest", initial.tensors, record)
    parts = RunParts(
        run="crowd",
        store=store,
        link=CrowdLink(spec, clients),
        strategy=strategy,
        method=METHODS["lora"],
        basis={},
        sent_basis={},
        settings=RoundSettings(
            seed=0,
            rounds=1,
            clients_per_round=None,
            quorum=clients,
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
        emit=lambda event: None,
    )
    run_rounds(parts, resume_state(store.load(), initial))
    store.close()
    print(status_bytes("self", "VmHWM"))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
