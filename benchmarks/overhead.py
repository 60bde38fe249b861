"""Framework overhead: rounds in which no client trains, in fedlora and in Flower's simulation.

    python benchmarks/overhead.py

Every fedlora client decodes and checks its broadcast and sends back a fixed small update (one
of 64 drawn beforehand: were all alike, the decompositions of the aggregation error would work
on denormal numbers, which no training gives).
All the rest is the real path: encoding, LocalLink, admission, spool, reduce, refactor,
aggregation error and the durable commit of the round. Beside it, in turns, Flower's own Ray
simulation runs a FedAvg of arrays of the same sizes with a ClientApp that returns what it
got. Every measurement is a fresh process.

Client-updates per second are counted from the end of round 1 to the end of the last round, so
that start-up counts for neither side. Memory is the peak resident set of the one process that
is server and clients at once. It is measured again with an adapter sixteen times as large,
because a server that kept its updates would hardly show with a small one.

Needs the extra `bench` for the Flower half; without it, or with --no-flower, that half is left
out. Writes overhead.json and overhead.md into --out.
"""

import argparse
import contextlib
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from fedlora.adapter import AdapterSpec, AdapterState, LayerSpec, trained_shapes
from fedlora.adapters import METHODS
from fedlora.adapters.lora import kaiming_uniform
from fedlora.checkpoint import RunStore
from fedlora.config.job import ScenarioSection
from fedlora.errors import AdapterError
from fedlora.messages import ClientUpdate
from fedlora.seeds import generator
from fedlora.server.admission import Limits
from fedlora.server.journal import Event
from fedlora.server.rounds import resume_state, run_rounds
from fedlora.server.run_parts import RoundSettings, RunParts
from fedlora.simulation.local import LocalLink
from fedlora.simulation.scenario import Scenario
from fedlora.strategies.base import Conditions
from fedlora.strategies.fedit import FedIT
from fedlora.wire import decode_broadcast, decode_part

METHOD = METHODS["lora"]
BAR_UPDATES_PER_S = 400.0
BAR_MEMORY_BYTES = 8 * 2**30
BAR_BYTES_PER_CLIENT = 8 * 2**10  # names, weights, tasks; never tensors
STEP = 1e-3
POOL = 64
MIB = 2**20


@dataclass(frozen=True)
class Size:
    """A LoRA adapter: `layers` square layers of `width`, each with A (r, k) and B (d, r)."""

    layers: int
    width: int
    rank: int

    @property
    def payload_bytes(self) -> int:
        """Float32 bytes of one client's update, without the header."""
        return self.layers * 2 * self.width * self.rank * 4

    def __str__(self) -> str:
        return (
            f"{self.layers} layers of {self.width}x{self.width}, rank {self.rank} "
            f"({self.payload_bytes // 1024} KiB an update)"
        )

    def spec(self) -> AdapterSpec:
        """The adapter's spec."""
        alpha = 2.0 * self.rank
        scale = METHOD.scale(self.rank, alpha)
        names = [f"model.layers.{i}.self_attn.q_proj" for i in range(self.layers)]
        layers = (LayerSpec(name, self.width, self.width, self.rank, scale) for name in names)
        return AdapterSpec("lora", self.rank, alpha, tuple(layers), (), {}, "no base", 0)

    def initial(self) -> AdapterState:
        """The adapter before round 1: A random, B zero."""
        spec, tensors = self.spec(), {}
        for layer in spec.layers:
            tensors[f"{layer.name}.A"] = kaiming_uniform(layer.rank, layer.inp, 0, layer.name)
            tensors[f"{layer.name}.B"] = torch.zeros(layer.out, layer.rank)
        return AdapterState(spec, tensors)


SMALL = Size(layers=4, width=64, rank=8)
LARGE = Size(layers=4, width=512, rank=16)


class IdleClients:
    """Clients that receive and check as a real one does, and train nothing."""

    def __init__(self, spec: AdapterSpec) -> None:
        self.spec = spec
        shapes = trained_shapes(spec, METHOD)
        stream = generator(0, "updates")
        self.pool = [
            {name: STEP * torch.randn(shape, generator=stream) for name, shape in shapes.items()}
            for _ in range(POOL)
        ]

    def work(self, client: str, manifest: bytes, fetch: Callable[[str], bytes]) -> ClientUpdate:
        """A fixed small update to whatever was broadcast."""
        broadcast = decode_broadcast(manifest)
        plan = broadcast.plan
        if broadcast.spec_digest != self.spec.digest():
            raise AdapterError("the server's adapter spec is not this client's")
        start = {}
        for part, digest in broadcast.parts.items():
            shapes = trained_shapes(self.spec, METHOD, [part.removeprefix("factor.")])
            start.update(decode_part(fetch(digest), digest, shapes))
        step = self.pool[int(client.rpartition("-")[2]) % POOL]
        sent = trained_shapes(self.spec, METHOD, plan.factors)
        # trained minus broadcast, as a client that trains makes it
        trained = {name: start[name] + step[name] for name in sent}
        delta = {name: trained[name] - start[name] for name in sent}
        return ClientUpdate(
            run=plan.run,
            round=plan.round,
            attempt=plan.attempt,
            client=client,
            start_sha256=broadcast.start_sha256,
            delta=AdapterState(self.spec, delta),
            num_examples=10,
            metrics={"train_loss": 1.0, "num_tokens": 100.0},
        )


def fedlora_rounds(folder: Path, size: Size, clients: int, rounds: int) -> dict[str, Any]:
    """Runs the rounds in this process; `folder` must not exist yet.

    Returns:
        ends: seconds from the start of round 1 to the end of each round.
        stages: stage -> seconds in each round.
        cpu_s: processor seconds of all rounds.
        rss_before, rss_peak: resident bytes before round 1, and at most.
        adapter_sha256: digest of the final adapter.
    """
    initial = size.initial()
    spec = initial.spec
    strategy = FedIT(METHOD)
    scenario = Scenario(
        ScenarioSection(),
        [f"client-{i:05d}" for i in range(clients)],
        rank=spec.rank,
        seed=0,
        max_update_norm=100.0,
    )
    strategy.check(Conditions(spec, [client.rank for client in scenario.clients]))
    state = strategy.init(initial)
    events: list[Event] = []
    ends: list[float] = []

    def emit(event: Event) -> None:
        if event["event"] != "round" or len(event["clients"]) != clients:
            raise AssertionError(f"a round without all {clients} updates: {event}")
        ends.append(time.perf_counter() - started)
        events.append({"seconds": event["seconds"], "adapter_sha256": event["adapter_sha256"]})

    record = {"run": "overhead", "spec_digest": spec.digest(), "extra": {}, "events": []}
    store = RunStore.create(folder, "", "", state.tensors, record)
    parts = RunParts(
        run="overhead",
        store=store,
        link=LocalLink(scenario, IdleClients(spec).work),
        strategy=strategy,
        method=METHOD,
        basis={},
        sent_basis={},
        settings=RoundSettings(
            seed=0,
            rounds=rounds,
            clients_per_round=None,
            quorum=None,
            deadline_s=600.0,
            retries=0,
            local_steps=1,
            optimizer_state="reset",
            evaluate_every=1,
            keep_rounds=2,
            keep_every=10,
            limits=Limits(max_update_norm=100.0, max_examples=1e9),
        ),
        evaluate=None,
        emit=emit,
    )
    state = resume_state(store.load(), state)
    before = _rss("VmRSS")
    _reset_peak()
    started, cpu = time.perf_counter(), time.process_time()
    run_rounds(parts, state)
    cpu_s = time.process_time() - cpu
    store.close()
    return {
        "ends": ends,
        "stages": {
            stage: [event["seconds"][stage] for event in events] for stage in events[0]["seconds"]
        },
        "cpu_s": cpu_s,
        "rss_before": before,
        "rss_peak": _rss("VmHWM"),
        "adapter_sha256": events[-1]["adapter_sha256"],
    }


def flower_rounds(size: Size, clients: int, rounds: int, cores: int) -> dict[str, Any]:
    """Flower's own simulation with its Ray backend, in this process and Ray's.

    Returns:
        ends: seconds from the start of the first round to the end of each round.
    """
    from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord
    from flwr.app import RecordDict as Records
    from flwr.clientapp import ClientApp
    from flwr.serverapp import Grid, ServerApp
    from flwr.serverapp.strategy import FedAvg
    from flwr.simulation import run_simulation

    client_app, server_app = ClientApp(), ServerApp()
    stamps: list[float] = []
    initial = {name: tensor.numpy() for name, tensor in size.initial().tensors.items()}

    @client_app.train()
    def train(message: Message, context: Context) -> Message:
        content = Records(
            {
                "arrays": message.content["arrays"],
                "metrics": MetricRecord({"train_loss": 1.0, "num-examples": 10}),
            }
        )
        return Message(content=content, reply_to=message)

    def stamp(number: int, arrays: ArrayRecord) -> None:
        stamps.append(time.perf_counter())

    @server_app.main()
    def main(grid: Grid, context: Context) -> None:
        strategy = FedAvg(
            fraction_train=1.0,
            fraction_evaluate=0.0,
            min_train_nodes=clients,
            min_available_nodes=clients,
        )
        # evaluate_fn is called once before round 1 and at the end of every round
        strategy.start(
            grid=grid,
            initial_arrays=ArrayRecord({name: Array(a) for name, a in initial.items()}),
            num_rounds=rounds,
            train_config=ConfigRecord({}),
            evaluate_fn=stamp,
        )

    run_simulation(
        server_app,
        client_app,
        num_supernodes=clients,
        backend_name="ray",
        backend_config={
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
            "init_args": {"num_cpus": cores, "include_dashboard": False},
        },
    )
    if len(stamps) != rounds + 1:
        raise AssertionError(f"Flower finished {len(stamps) - 1} of {rounds} rounds")
    return {"ends": [s - stamps[0] for s in stamps[1:]]}


def updates_per_s(ends: Sequence[float], clients: int) -> float:
    """Client-updates per second from the end of round 1 to the end of the last round."""
    return clients * (len(ends) - 1) / (ends[-1] - ends[0])


def _rss(field: str) -> int:
    # ru_maxrss survives exec on Linux: it would tell the parent's peak
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        unit = 1 if sys.platform == "darwin" else 1024
        return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def _reset_peak() -> None:
    # otherwise the peak of the imports could hide what the rounds need
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


@dataclass(frozen=True)
class Case:
    """One measurement in a process of its own."""

    engine: str
    size: Size
    clients: int
    rounds: int
    threads: int
    cores: int


def run_case(case: Case) -> dict[str, Any]:
    """Runs `case` in a fresh process and returns what it measured.

    Raises:
        RuntimeError: the process failed; with the end of its output.
    """
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "result.json"
        environment = {
            **os.environ,
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_HOME": str(Path(folder) / "flwr"),
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        command = [sys.executable, __file__, "--case", json.dumps(asdict(case)), "--out", folder]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode or not output.is_file():
            raise RuntimeError(f"{case} failed:\n{(done.stdout + done.stderr)[-4000:]}")
        result: dict[str, Any] = json.loads(output.read_text())
        return result


def _child(fields: Mapping[str, Any], folder: Path) -> None:
    case = Case(**{**fields, "size": Size(**fields["size"])})
    torch.set_num_threads(case.threads)
    if case.engine == "flower":
        result = flower_rounds(case.size, case.clients, case.rounds, case.cores)
    else:
        result = fedlora_rounds(folder / "run", case.size, case.clients, case.rounds)
    (folder / "result.json").write_text(json.dumps(result))


def _spread(values: Sequence[float]) -> dict[str, Any]:
    return {
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
        "values": list(values),
    }


def _cores() -> int:
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def _machine(threads: int) -> dict[str, Any]:
    from fedlora.server.machine import machine

    peers = {name: version(name) for name in ("flwr", "ray") if find_spec(name)}
    return {**machine(threads), "cores": _cores(), **peers}


def measure(options: argparse.Namespace, say: Callable[[str], None]) -> dict[str, Any]:
    """All measurements that `options` ask for, fedlora and Flower in turns."""
    cores = _cores()
    with_flower = options.flower and find_spec("flwr") is not None and find_spec("ray") is not None
    if options.flower and not with_flower:
        say("Flower is not installed (extra: bench); its half is left out")
    ours: list[dict[str, Any]] = []
    rates: dict[str, list[float]] = {"fedlora": []}
    for _ in range(options.repeat):
        for engine in ("fedlora", "flower") if with_flower else ("fedlora",):
            case = Case(engine, SMALL, options.clients, options.rounds, options.threads, cores)
            result = run_case(case)
            if engine == "fedlora":
                ours.append(result)
            rate = updates_per_s(result["ends"], options.clients)
            rates.setdefault(engine, []).append(rate)
            say(f"{engine:8} {rate:8.0f} client-updates/s")
    per_round = [
        {stage: statistics.median(values[1:]) for stage, values in run["stages"].items()}
        for run in ours
    ]
    memory = []
    for size in (SMALL, LARGE):
        for clients in options.memory:
            case = Case("fedlora", size, clients, options.memory_rounds, options.threads, cores)
            run = run_case(case)
            row = {
                "size": asdict(size),
                "clients": clients,
                "updates_bytes": clients * size.payload_bytes,
                "rss_before": run["rss_before"],
                "rss_peak": run["rss_peak"],
                "updates_per_s": updates_per_s(run["ends"], clients),
            }
            memory.append(row)
            say(f"{clients} clients, {size}: peak {run['rss_peak'] / MIB:.0f} MiB")
    return {
        "adapter": asdict(SMALL),
        "clients": options.clients,
        "rounds": options.rounds,
        "updates_per_s": {engine: _spread(values) for engine, values in rates.items()},
        "cpu_ms_per_update": _spread(
            [1e3 * run["cpu_s"] / (options.clients * options.rounds) for run in ours]
        ),
        "seconds_per_round": {
            stage: statistics.median(row[stage] for row in per_round) for stage in per_round[0]
        },
        "memory": memory,
    }


def report(found: Mapping[str, Any]) -> str:
    """overhead.md: the tables, the machine and the command."""
    machine = found["machine"]
    clients = found["clients"]
    lines = [
        "# Framework overhead, without training",
        "",
        f"    {found['command']}",
        "",
        f"{machine['processor']}, {machine['cores']} cores, {machine['system']}; Python "
        f"{machine['python']}, torch {machine['torch']}, {machine['threads']} torch thread(s). "
        f"Load average {found['load'][0]} before the first run and {found['load'][1]} after the "
        f"last; above {machine['cores']}, other work took its share and all rates are "
        "lower bounds.",
        "",
        f"{found['rounds']} rounds of {clients} clients, adapter: {Size(**found['adapter'])}. "
        "Steady state: from the end of round 1 to the end of the last round. Every run is a fresh "
        "process; the two take turns.",
        "",
        "| engine | client-updates/s, median | lowest | highest | runs |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    labels = {
        "fedlora": "fedlora, local engine",
        "flower": f"Flower {machine.get('flwr')}, Ray {machine.get('ray')} simulation",
    }
    for engine, rate in found["updates_per_s"].items():
        lines.append(
            f"| {labels[engine]} | {rate['median']:.0f} | "
            f"{rate['min']:.0f} | {rate['max']:.0f} | {len(rate['values'])} |"
        )
    cpu = found["cpu_ms_per_update"]
    lines += [
        "",
        f"fedlora spends {cpu['median']:.2f} ms of processor time per update "
        f"({cpu['min']:.2f} to {cpu['max']:.2f}), server and client together, and syncs every "
        "round to disk. Its clients share one process; Flower's are Ray actors on all cores, "
        "with the isolation and the inter-process transfers that this brings: Flower's "
        "simulation has no other backend.",
        "",
        "Where a round's time goes (median seconds; `clients` holds broadcast decoding, "
        "encoding and admission):",
        "",
        "| " + " | ".join(found["seconds_per_round"]) + " |",
        "| " + " | ".join("---:" for _ in found["seconds_per_round"]) + " |",
        "| " + " | ".join(f"{s:.4f}" for s in found["seconds_per_round"].values()) + " |",
        "",
        "## Memory",
        "",
        "Peak resident set of the one process that is server and all clients.",
        "",
        "| adapter | clients | all updates, MiB | before round 1, MiB | peak, MiB | "
        "above before, MiB | client-updates/s |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in found["memory"]:
        lines.append(
            f"| {Size(**row['size'])} | {row['clients']} | {row['updates_bytes'] / MIB:.0f} | "
            f"{row['rss_before'] / MIB:.0f} | {row['rss_peak'] / MIB:.0f} | "
            f"{(row['rss_peak'] - row['rss_before']) / MIB:.0f} | {row['updates_per_s']:.0f} |"
        )
    lines += ["", "## Bars", "", "| bar | measured | met |", "| --- | --- | --- |"]
    lines += [f"| {bar} | {value} | {'yes' if met else 'no'} |" for bar, value, met in bars(found)]
    return "\n".join(lines) + "\n"


def bars(found: Mapping[str, Any]) -> list[tuple[str, str, bool]]:
    """(bar, what was measured, met) for every bar."""
    rate = found["updates_per_s"]["fedlora"]["median"]
    result = [
        (
            f"at least {BAR_UPDATES_PER_S:.0f} client-updates/s on 2 cores",
            f"{rate:.0f}",
            rate >= BAR_UPDATES_PER_S,
        )
    ]
    if "flower" in found["updates_per_s"]:
        other = found["updates_per_s"]["flower"]["median"]
        result.append(
            ("faster than Flower's simulation", f"{rate / other:.1f} times", rate > other)
        )
    if found["memory"]:
        peak = max(row["rss_peak"] for row in found["memory"])
        most = max(row["clients"] for row in found["memory"])
        result.append(
            (
                f"{most} clients in less than {BAR_MEMORY_BYTES // 2**30} GiB",
                f"{peak / 2**30:.2f} GiB",
                peak < BAR_MEMORY_BYTES,
            )
        )
    for layers in {row["size"]["width"]: row["size"] for row in found["memory"]}.values():
        rows = [row for row in found["memory"] if row["size"] == layers]
        first, last = rows[0], rows[-1]
        growth = (last["rss_peak"] - last["rss_before"]) - (first["rss_peak"] - first["rss_before"])
        extra = last["updates_bytes"] - first["updates_bytes"]
        more = last["clients"] - first["clients"]
        each = growth / max(1, more)
        result.append(
            (
                f"memory grows by at most {BAR_BYTES_PER_CLIENT // 1024} KiB a client "
                f"({Size(**layers)})",
                f"{growth / MIB:+.0f} MiB from {first['clients']} to {last['clients']} clients "
                f"({each / 1024:.1f} KiB a client), whose updates are {extra / MIB:.0f} MiB more",
                growth <= BAR_BYTES_PER_CLIENT * more,
            )
        )
    return result


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--clients", type=int, default=100, help="clients a round, for the rates")
    add("--rounds", type=int, default=11, help="rounds of each run, for the rates")
    add("--repeat", type=int, default=3, help="runs of each engine")
    add("--memory", type=int, nargs="*", default=[100, 300, 1000], help="clients, for memory")
    add("--memory-rounds", type=int, default=2, help="rounds of each memory run")
    add("--threads", type=int, default=1, help="torch threads of fedlora")
    add("--no-flower", dest="flower", action="store_false", help="leave Flower out")
    add("--out", type=Path, default=Path(__file__).parent / "results", help="folder of results")
    add("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        _child(json.loads(options.case), options.out)
        return
    machine = _machine(options.threads)
    print(json.dumps(machine, indent=2))
    command = " ".join(["python benchmarks/overhead.py", *sys.argv[1:]])
    load = os.getloadavg()[0]
    found = {"command": command, "machine": machine, **measure(options, print)}
    found["load"] = [round(load, 1), round(os.getloadavg()[0], 1)]
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "overhead.json").write_text(json.dumps(found, indent=2) + "\n")
    text = report(found)
    (options.out / "overhead.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
