"""Contenders of a comparison: a label each, and what it changes in the job they share."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fedlora.adapters import METHODS
from fedlora.config.job import Job
from fedlora.config.load import parse_job
from fedlora.errors import ConfigError, near_miss
from fedlora.report.comparison import skew_text
from fedlora.strategies.plugin import find_strategy

BASELINES = ("local", "centralised")

# what a score depends on besides the method that is compared
SHARED = ("model", "data", "partition", "evaluation", "run")


@dataclass(frozen=True)
class Contender:
    """One column of a comparison.

    Attributes:
        label: its name in tables and folders.
        overrides: `section.key=value`, applied to the job.
    """

    label: str
    overrides: tuple[str, ...] = ()


def strategy_contender(name: str) -> Contender:
    """A strategy by its name, with the options the job gives it."""
    return Contender(name, (f"federation.strategy={json.dumps(name)}",))


def contender_job(job: Job, contender: Contender) -> Job:
    """The job of one contender.

    Options that the job gives to its strategy are dropped when a contender names another one:
    they would not fit.

    Raises:
        ConfigError: all problems, each with the contender's label.
    """
    tree = _tree(job)
    problems: Sequence[str] = ()
    try:
        named = [o for o in contender.overrides if o.startswith("federation.strategy=")]
        if parse_job(_tree(job), named).federation.strategy != job.federation.strategy:
            tree["federation"].pop("strategy_options", None)
        known = {"adapter.method": list(METHODS)}
        changed = parse_job(tree, contender.overrides, known)
        find_strategy(changed.federation.strategy)
    except ConfigError as e:
        problems = e.problems
    else:
        problems = [
            f"changes [{section}], which all contenders must share for their scores to be "
            "comparable; change it for all of them with --override"
            for section in SHARED
            if getattr(changed, section) != getattr(job, section)
        ]
    if problems:
        raise ConfigError(*(f"contender {contender.label!r}: {problem}" for problem in problems))
    return changed


def contender_jobs(
    job: Job, contenders: Sequence[Contender], baselines: Sequence[str]
) -> dict[str, Job]:
    """The job of every contender, by label.

    Raises:
        ConfigError: all problems of all contenders and baselines.
    """
    problems: list[str] = []
    jobs: dict[str, Job] = {}
    folders: dict[str, str] = {}
    for name in baselines:
        if name not in BASELINES:
            problems.append(
                f"baseline {name!r} is not known{near_miss(name, BASELINES)}; "
                f"known: {', '.join(BASELINES)}"
            )
    for contender in contenders:
        label, folder = contender.label, folder_name(contender.label)
        if not label.strip():
            problems.append(f"a contender has the label {label!r}; give it a name")
        if label in BASELINES:
            problems.append(f"contender {label!r} is named like a baseline; choose another label")
        if folder in folders:
            problems.append(
                f"contenders {folders[folder]!r} and {label!r} would share the folder name "
                f"{folder!r}; give them labels that differ in letters or digits"
            )
        folders[folder] = label
        try:
            jobs[label] = contender_job(job, contender)
        except ConfigError as e:
            problems += e.problems
    if not contenders and not baselines:
        problems.append("nothing to compare; name strategies, variants or baselines")
    if problems:
        raise ConfigError(*problems)
    return jobs


def check_skews(job: Job, skews: Sequence[float]) -> None:
    """Refuses levels of skew that the job's division of the data cannot take.

    Raises:
        ConfigError: the job divides its data in another way, or an alpha is not positive.
    """
    kind = job.partition.kind
    problems = [
        f"skew {alpha!r} is not a Dirichlet concentration; give positive numbers"
        for alpha in skews
        if not (math.isfinite(alpha) and alpha > 0)
    ]
    if len(set(skews)) < len(skews):
        problems.append("a level of skew is given twice; give each once")
    if skews and kind not in ("iid", "dirichlet"):
        problems.append(
            f'levels of skew set partition.alpha of partition.kind = "dirichlet", but the job has '
            f'partition.kind = "{kind}"; leave --skew out to compare on that division, or give '
            "--override partition.kind=dirichlet and a number of partition.clients"
        )
    if problems:
        raise ConfigError(*problems)


def placed(job: Job, skew: float | None, seed: int) -> Job:
    """The job at one level of skew (None: as it is) and one seed."""
    update: dict[str, Any] = {"run": job.run.model_copy(update={"seed": seed})}
    if skew is not None:
        update["partition"] = job.partition.model_copy(
            update={"kind": "dirichlet", "alpha": float(skew)}
        )
    return job.model_copy(update=update)


def run_name(label: str, skew: float | None, seed: int) -> str:
    """Name of a run's folder."""
    level = "" if skew is None else f"-alpha{skew_text(skew)}"
    return f"{folder_name(label)}{level}-seed{seed}"


def folder_name(label: str) -> str:
    """A label with everything replaced that a file name should not hold."""
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in label)


def _tree(job: Job) -> dict[str, Any]:
    return job.model_dump(mode="json", exclude_none=True)
