"""What compression costs and saves: bytes and loss of the quickstart job, scheme by scheme.

    python benchmarks/compression.py

The job of `fedlora simulate` without arguments (four sites, a language model of 0.8 million
parameters, LoRA of rank 8 on every linear layer, fedit) with more and shorter rounds and
smaller batches, for several seeds. The loss is that on the held-out text of all sites after the
last round, in nats per token. Each scheme's difference is to the run without compression of the
same seed. Bytes are those of the rounds' own records, manifests included.

Writes compression.md and compression.json into --out.
"""

import argparse
import json
import statistics
import tempfile
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import transformers

from fedlora.config.job import Job
from fedlora.config.load import load_job
from fedlora.models.loading import quiet
from fedlora.simulation.federation import Federation, Loaded, load, machine

BARE = {"error_feedback": False}
SCHEMES: Mapping[str, Mapping[str, Any]] = {
    "none": {},
    "up bf16": {"up": "bf16"},
    "up int8": {"up": "int8"},
    "up int4": {"up": "int4"},
    "up int4, no feedback": {"up": "int4", **BARE},
    "up float32, top 10 %": {"top_k": 0.1},
    "up float32, top 10 %, no feedback": {"top_k": 0.1, **BARE},
    "up int4, top 10 %": {"up": "int4", "top_k": 0.1},
    "up int4, top 1 %": {"up": "int4", "top_k": 0.01},
    "up int4, top 1 %, no feedback": {"up": "int4", "top_k": 0.01, **BARE},
    "down bf16": {"down": "bf16"},
    "down int8": {"down": "int8"},
    "up int4, down int8": {"up": "int4", "down": "int8"},
}


def job(seed: int, rounds: int, steps: int, compression: Mapping[str, Any]) -> Job:
    tree = load_job(Path(str(files("fedlora.config") / "quickstart.toml"))).model_dump()
    tree["training"] |= {"local_steps": steps, "batch_size": 4}
    tree["federation"]["rounds"] = rounds
    tree["evaluation"] |= {"every": rounds, "baselines": []}
    tree["run"]["seed"] = seed
    return Job.model_validate({**tree, "compression": dict(compression)})


def run(given: Job, loaded: Loaded) -> dict[str, Any]:
    """Final loss and mean bytes per round of one run."""
    events: list[dict[str, Any]] = []
    federation = Federation(given, loaded, emit=events.append)
    with tempfile.TemporaryDirectory() as place:
        store = federation.start(Path(place) / "run")
        try:
            federation.run(store)
        finally:
            store.close()
    rounds = [event for event in events if event["event"] == "round"]
    return {
        "loss": rounds[-1]["eval"]["loss"],
        "base": events[0]["eval"]["loss"],
        "up": statistics.mean(event["bytes_up"] for event in rounds),
        "down": statistics.mean(event["bytes_down"] for event in rounds),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    given = parser.parse_args()
    transformers.logging.set_verbosity_error()
    results: list[dict[str, Any]] = []
    for seed in range(given.seeds):
        with quiet():
            loaded = load(job(seed, given.rounds, given.steps, {}))
        for name, compression in SCHEMES.items():
            found = run(job(seed, given.rounds, given.steps, compression), loaded)
            results.append({"seed": seed, "scheme": name, **found})
            print(json.dumps(results[-1]), flush=True)
    record = {
        "machine": machine(1),
        "seeds": given.seeds,
        "rounds": given.rounds,
        "steps": given.steps,
        "results": results,
    }
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "compression.json").write_text(json.dumps(record, indent=1) + "\n")
    (given.out / "compression.md").write_text(report(record))


def report(record: Mapping[str, Any]) -> str:
    """The figures as markdown."""
    by_scheme: dict[str, list[Mapping[str, Any]]] = {}
    for row in record["results"]:
        by_scheme.setdefault(row["scheme"], []).append(row)
    plain = by_scheme["none"]
    base = statistics.mean(row["base"] for row in plain)
    gain = base - statistics.mean(row["loss"] for row in plain)
    lines = [
        "# Compression",
        "",
        f"`python benchmarks/compression.py --seeds {record['seeds']} --rounds "
        f"{record['rounds']} --steps {record['steps']}`; see the file for the task.",
        "",
        f"Machine: {record['machine']['processor']}, {record['machine']['system']}, Python "
        f"{record['machine']['python']}, torch {record['machine']['torch']}, 1 thread.",
        "",
        "Bytes of one round, all clients together, mean over rounds and seeds; loss after the "
        f"last round, mean over {record['seeds']} seeds (the base model has {base:.4f}), and its "
        "difference to no compression: mean (least to greatest over seeds). The last column is "
        "the part of what an uncompressed run takes off the base model's loss.",
        "",
        "| scheme | bytes up | of none | bytes down | of none | loss | difference | learnt |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, rows in by_scheme.items():
        up, down, loss = (
            statistics.mean(row[key] for row in rows) for key in ("up", "down", "loss")
        )
        of_up, of_down = (
            100 * mean / statistics.mean(row[key] for row in plain)
            for key, mean in (("up", up), ("down", down))
        )
        gaps = [row["loss"] - none["loss"] for row, none in zip(rows, plain, strict=True)]
        lines.append(
            f"| {name} | {up:,.0f} | {of_up:.1f} % | {down:,.0f} | {of_down:.1f} % | {loss:.4f} | "
            f"{statistics.mean(gaps):+.4f} ({min(gaps):+.4f} to {max(gaps):+.4f}) | "
            f"{100 * (base - loss) / gain:.0f} % |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
