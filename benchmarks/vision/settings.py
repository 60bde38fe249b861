"""What the vision benchmark runs: its settings and the strategies under test, as jobs."""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedlora.config.job import Job

SCALE = 2.0
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"]
GRID = (0.03, 0.1, 0.3, 1.0)
FIRST_TUNING_SEED = 100
"""Seeds from here on choose learning rates and are not scored."""


@dataclass(frozen=True)
class Setting:
    """One way to federate the digits.

    Attributes:
        column: column whose values are the clients.
        steps: local steps per round.
        rounds: rounds of a run.
        every: rounds between evaluations.
        chosen: clients per round; None takes all.
        ranks: ranks of the clients in order of name; all have the largest when empty.
        batch: examples of a step (expected ones, under privacy).
        epsilon: of DP-SGD in every client, at delta 1e-5 and clip norm 1; None trains plainly.
    """

    column: str
    steps: int
    rounds: int
    every: int
    chosen: int | None = None
    ranks: tuple[int, ...] = (4,)
    batch: int = 32
    epsilon: float | None = None


SETTINGS = {
    "V1": Setting("domain", steps=10, rounds=30, every=5),
    "V2": Setting("client", steps=15, rounds=40, every=5, chosen=6),
    "V2-long": Setting("client", steps=60, rounds=12, every=2, chosen=6),
    "V3": Setting("domain", steps=10, rounds=30, every=5, ranks=(2, 2, 4, 4, 8, 8)),
    **{
        name: Setting("domain", steps=8, rounds=20, every=5, batch=48, epsilon=epsilon)
        for name, epsilon in (("V4", None), ("V4-e6", 6.0), ("V4-e3", 3.0), ("V4-e1", 1.0))
    },
}


@dataclass(frozen=True)
class Arm:
    """A strategy under test with its options and wrappers."""

    strategy: str
    options: Mapping[str, Any] = field(default_factory=dict)
    wrappers: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str) -> "Arm":
        """Reads `strategy[:option=value;...][+wrapper...]`; values are written as in TOML."""
        first, *wrappers = text.split("+")
        strategy, _, options = first.partition(":")
        pairs = [pair.partition("=") for pair in options.split(";") if pair]
        values = {name: tomllib.loads(f"value = {value}")["value"] for name, _, value in pairs}
        return cls(strategy, values, tuple(wrappers))

    @property
    def label(self) -> str:
        """The text that `parse` reads, options in order of name."""
        pairs = ";".join(f"{name}={_toml(value)}" for name, value in sorted(self.options.items()))
        return "+".join([self.strategy + (f":{pairs}" if pairs else ""), *self.wrappers])


def make_job(
    setting: Setting, arm: Arm, place: Path, *, rate: float, seed: int, threads: int = 1
) -> Job:
    """The job of one run.

    Args:
        setting: how the digits are federated.
        arm: how updates are merged.
        place: the seed's folder, as made by `prepare`.
        rate: learning rate of plain SGD.
        seed: the run's seed.
        threads: CPU threads.
    """
    rank = max(setting.ranks)
    federation: dict[str, Any] = {
        "strategy": arm.strategy,
        "strategy_options": dict(arm.options),
        "rounds": setting.rounds,
        "clients_per_round": setting.chosen,
        # a diverged client ends the run; the same data would diverge again
        "retries": 0,
    }
    if arm.wrappers:
        federation["wrappers"] = [{"name": name} for name in arm.wrappers]
    privacy: dict[str, Any] = {}
    if setting.epsilon is not None:
        privacy = {"privacy": {"epsilon": setting.epsilon, "delta": 1e-5, "max_grad_norm": 1.0}}
    return Job.model_validate(
        {
            **privacy,
            "model": {"name": str(place / "model"), "task": "image-classification"},
            "data": {
                "source": str(place / "train.parquet"),
                "test": str(place / "test.parquet"),
                # the order of the pretrained head, which then stays as it is
                "labels": [str(label) for label in range(10)],
                "validation_fraction": 0.001,
            },
            "partition": {"kind": "natural", "column": setting.column, "clients": 0},
            "adapter": {"rank": rank, "alpha": SCALE * rank, "targets": TARGETS, "heads": []},
            "training": {
                "local_steps": setting.steps,
                "batch_size": setting.batch,
                "optimizer": "sgd",
                "learning_rate": rate,
                "max_grad_norm": 0.0,
            },
            "federation": federation,
            "scenario": {"ranks": list(setting.ranks)},
            "evaluation": {"every": setting.every, "batch_size": 397},
            "run": {"name": arm.label, "seed": seed, "threads": threads},
        }
    )


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str) else str(value)
