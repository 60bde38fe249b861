"""What hostile clients do to a run, and what the wrappers leave of it.

    python benchmarks/hostile.py

Scikit-learn's 1797 digits of 8 x 8 pixels (https://archive.ics.uci.edu/dataset/80, its test
part): a vision transformer of two layers of width 32 is pretrained on 600 of them; of the
others, 797 are divided at random among ten clients and
400 are the test. Adapters (LoRA of rank 4 on every linear layer) and a new head are trained.

Three of ten clients are hostile in every round. What they send keeps to the protocol and is
admitted: sign-flip (the honest update times -strength), scale (times strength), label-flip
(trained on classes 9 - c; also scaled) and shift (plus one direction that all three share, of
strength times the update's norm). For each, the run with the wrapper that fits stands beside
the run without and beside runs without hostile clients, over several seeds, each of which
draws its own division of the pictures, model and hostile clients.

The bar: with the wrapper the mean accuracy is within two points of the clean run without a
wrapper, and without it is lower than that; an attack that does less is called harmless.
Writes hostile.md and hostile.json into --out.
"""

import argparse
import io
import json
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import transformers
from PIL import Image
from torch import Tensor

from fedlora.config.job import Job
from fedlora.models.loaded import Loaded, load
from fedlora.models.loading import quiet
from fedlora.seeds import derive_seed, generator
from fedlora.server.machine import machine
from fedlora.simulation.federation import Federation

PRETRAIN, TEST = 600, 400
PRETRAIN_STEPS = 800
CLIENTS = 10
HOSTILE = 3
BAR = 0.02
Table = list[dict[str, Any]]

KRUM: Table = [{"name": "multi-krum", "hostile": 3}]
# name -> (kinds and strengths, all of them by the same clients; the wrappers that fit)
ATTACKS: Mapping[str, tuple[Mapping[str, float], Table]] = {
    "sign-flip": ({"sign-flip": 4.0}, KRUM),
    "scale": ({"scale": 30.0}, [{"name": "norm-cap"}]),
    "label-flip": ({"label-flip": 1.0}, KRUM),
    "label-flip, scaled": ({"label-flip": 1.0, "scale": 10.0}, KRUM),
    "shift": ({"shift": 8.0}, [{"name": "coordinate-median"}]),
}


def prepare(folder: Path, seed: int) -> None:
    """Writes train.parquet, test.parquet and model/ of a seed."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = torch.tensor(digits.images, dtype=torch.float32) / 16  # (n, 8, 8)
    labels = torch.tensor(digits.target)
    order = torch.randperm(len(labels), generator=generator(seed, "digits"))
    clean, test, train = order.split([PRETRAIN, TEST, len(labels) - PRETRAIN - TEST])
    folder.mkdir(parents=True)
    for part, numbers in (("test", test), ("train", train)):
        rows = []
        for number in numbers.tolist():
            file = io.BytesIO()
            picture(pixels[number]).save(file, "PNG")
            rows.append({"image": file.getvalue(), "label": str(labels[number].item())})
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{part}.parquet")
    processor = transformers.ViTImageProcessorPil(do_resize=False)
    shown = [picture(square).convert("RGB") for square in pixels[clean]]
    whole = processor(images=shown, return_tensors="pt")["pixel_values"]  # (n, 3, 8, 8)
    config = transformers.ViTConfig(
        image_size=8,
        patch_size=2,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        num_labels=10,
    )
    draws = generator(seed, "pretrain")
    with torch.random.fork_rng(devices=[]), quiet():
        torch.manual_seed(derive_seed(seed, "model"))
        model = transformers.ViTForImageClassification(config)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for _ in range(PRETRAIN_STEPS):
            picks = torch.randint(len(clean), (32,), generator=draws)
            logits = model(pixel_values=whole[picks]).logits
            torch.nn.functional.cross_entropy(logits, labels[clean[picks]]).backward()
            optimizer.step()
            optimizer.zero_grad()
        # without its head, so that the federation has one to learn
        model.vit.save_pretrained(folder / "model")
        processor.save_pretrained(folder / "model")


def picture(square: Tensor) -> Image.Image:
    """Ink (8, 8) between 0 and 1 as a picture."""
    return Image.fromarray((square * 255).round().byte().numpy())


def job(folder: Path, seed: int, rounds: int, attack: str | None, wrappers: Table) -> Job:
    """The job of one run; `attack` is one of ATTACKS, if any."""
    kinds = ATTACKS[attack][0] if attack is not None else {}
    picks = torch.randperm(CLIENTS, generator=generator(seed, "hostile"))[:HOSTILE]
    names = [f"client-{number:03d}" for number in sorted(picks.tolist())]
    hostile = [{"kind": k, "clients": names, "strength": kinds[k]} for k in kinds]
    return Job.model_validate(
        {
            "model": {"name": str(folder / "model"), "task": "image-classification"},
            "data": {
                "source": str(folder / "train.parquet"),
                "test": str(folder / "test.parquet"),
            },
            "partition": {"kind": "iid", "clients": CLIENTS},
            "adapter": {"rank": 4},
            "training": {"local_steps": 10, "batch_size": 16, "learning_rate": 5e-3},
            "federation": {"rounds": rounds, "wrappers": wrappers},
            "scenario": {"hostile": hostile},
            "evaluation": {"every": rounds, "batch_size": TEST},
            "run": {"seed": seed},
        }
    )


def run(made: Job, loaded: Loaded) -> dict[str, Any]:
    """Final accuracy, and how many updates admission refused."""
    rounds: list[dict[str, Any]] = []

    def keep(event: dict[str, Any]) -> None:
        if event["event"] == "round":
            rounds.append(event)

    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as place:
        federation = Federation(made, loaded, emit=keep)
        store = federation.start(Path(place) / "run")
        try:
            federation.run(store)
        finally:
            store.close()
    return {
        "accuracy": rounds[-1]["eval"]["accuracy"],
        "rejected": sum(event["rejected"] for event in rounds),
        "seconds": round(time.perf_counter() - started, 1),
    }


def cases() -> Iterator[tuple[str, str | None, Table]]:
    """(name, attack, wrappers) of every run of a seed."""
    yield "clean", None, []
    for attack, (_, wrappers) in ATTACKS.items():
        yield attack, attack, []
        yield f"{attack} wrapped", attack, wrappers
    seen: list[Table] = []
    for _, wrappers in ATTACKS.values():
        if wrappers not in seen:
            seen.append(wrappers)
            yield f"clean {wrappers[0]['name']}", None, wrappers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    given = parser.parse_args()
    transformers.logging.set_verbosity_error()
    results: list[dict[str, Any]] = []
    for seed in range(given.seeds):
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place) / "digits"
            prepare(folder, seed)
            loaded = load(job(folder, seed, given.rounds, None, []))
            for name, attack, wrappers in cases():
                found = run(job(folder, seed, given.rounds, attack, wrappers), loaded)
                results.append({"seed": seed, "case": name, **found})
                print(json.dumps(results[-1]), flush=True)
    given.out.mkdir(parents=True, exist_ok=True)
    record = {
        "machine": machine(1),
        "seeds": given.seeds,
        "rounds": given.rounds,
        "attacks": ATTACKS,
        "results": results,
    }
    (given.out / "hostile.json").write_text(json.dumps(record, indent=1) + "\n")
    (given.out / "hostile.md").write_text(report(record))


def report(record: Mapping[str, Any]) -> str:
    """The figures as markdown."""
    by_case: dict[str, list[float]] = {}
    for row in record["results"]:
        by_case.setdefault(row["case"], []).append(row["accuracy"])

    def mean(case: str) -> float:
        return statistics.mean(by_case[case])

    def cell(case: str) -> str:
        return f"{100 * mean(case):.1f} ({', '.join(f'{100 * x:.1f}' for x in by_case[case])})"

    clean = mean("clean")
    refused = sum(row["rejected"] for row in record["results"])
    lines = [
        "# Hostile clients",
        "",
        f"`python benchmarks/hostile.py --seeds {record['seeds']} --rounds {record['rounds']}`; "
        "see the file for task, attacks and bar.",
        "",
        f"Machine: {record['machine']['processor']}, {record['machine']['system']}, Python "
        f"{record['machine']['python']}, torch {record['machine']['torch']}, 1 thread.",
        "",
        "Accuracy on the test pictures after the last round in percent: mean (each seed). "
        f"{refused} updates were refused on admission.",
        "",
        f"Clean, no wrapper: {cell('clean')}",
        "",
        "| attack by 3 of 10 | strength | without wrapper | wrapper | with wrapper | to clean | "
        "bar |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for attack, (kinds, wrappers) in record["attacks"].items():
        gap = mean(f"{attack} wrapped") - clean
        harmful = mean(attack) < clean - BAR
        verdict = "met" if gap >= -BAR and harmful else "missed" if harmful else "harmless"
        strengths = ", ".join(f"{strength:g}" for strength in kinds.values())
        named = " around ".join(_written(table) for table in wrappers)
        lines.append(
            f"| {attack} | {strengths} | {cell(attack)} | {named} | "
            f"{cell(f'{attack} wrapped')} | "
            f"{100 * gap:+.1f} | {verdict} |"
        )
    lines += ["", "Without hostile clients, what the wrappers cost:", ""]
    for case in by_case:
        if case.startswith("clean "):
            lines.append(f"- {case.removeprefix('clean ')}: {cell(case)}")
    return "\n".join(lines) + "\n"


def _written(table: Mapping[str, Any]) -> str:
    options = ", ".join(f"{key} = {value}" for key, value in table.items() if key != "name")
    return f"{table['name']} ({options})" if options else str(table["name"])


if __name__ == "__main__":
    main()
