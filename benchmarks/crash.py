"""The kill -9 campaign with its figures: the real store and a naive one.

PYTHONPATH=. python benchmarks/crash.py [--trials 50] [--out benchmarks/results/crash.md]
"""

import argparse
import tempfile
from pathlib import Path

import torch

from fedlora.checkpoint import RunStore
from fedlora.server.machine import machine
from tests.faults.crash import ROUNDS, NaiveStore, create, drive, run_trial


def main() -> None:
    """Runs the campaign and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=50)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/crash.md"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        create(root / "whole", RunStore)
        expected = drive(root / "whole", RunStore, root / "log")
        for label, kind, longest in (("fedlora", RunStore, 40), ("naive save", NaiveStore, 12)):
            kills = broken = 0
            for seed in range(options.trials):
                trial = run_trial(root / f"{kind.__name__}{seed}", kind, seed, longest)
                kills += trial.kills
                broken += bool(trial.problem) or trial.sha256 != expected
            rows.append(f"| {label} | {options.trials} | {kills} | {broken} |")
    text = f"""# kill -9 at random writes, syncs and renames

    PYTHONPATH=. python benchmarks/crash.py --trials {options.trials}

{ROUNDS} rounds, three clients, about 2 MB of factors. A run is broken when it cannot be resumed,
when a round that was reported as committed is lost, done again or changed, or when the final
adapter is not the uninterrupted run's, bit for bit.

| store | runs | kills | broken runs |
| --- | ---: | ---: | ---: |
{chr(10).join(rows)}

Machine: {", ".join(f"{key} {value}" for key, value in machine(1).items())}.
"""
    options.out.write_text(text, "utf-8")
    print(text)


if __name__ == "__main__":
    main()
