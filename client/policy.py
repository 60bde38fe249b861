"""Policy: what a site permits a server to ask of it, the typed tree of its policy.toml.

A job comes from the server and is untrusted here. The policy belongs to the site, lies on its
own disk, and wins: what it does not permit is refused before anything is loaded or fetched.
Only counts and names are bounded here; sizes and shapes of tensors are held by
`fedlora.wire`, which takes no byte that it does not expect.
"""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import Field

from fedlora.config.job import Job
from fedlora.config.load import parse_table, read_toml
from fedlora.config.privacy import PrivacySection
from fedlora.config.section import NonNegative, Positive, Section
from fedlora.config.template import render_tables
from fedlora.errors import PolicyError
from fedlora.messages import Broadcast, RoundPlan
from fedlora.wire import MAX_FOLD_VERSIONS

Patterns = list[Annotated[str, Field(min_length=1)]]
Task = Literal["causal-lm", "sequence-classification", "image-classification"]

ANY = ["*"]
TASKS: list[Task] = list(get_args(Task))
MIB = 1024 * 1024
HEADING = """\
# What this site permits a federation to ask of it. It wins over the server's job.
# Every value below is the default; a line that starts with "# key =" is a limit that is off.
# Lists hold names or patterns: * is any text, ? one character, [ab] one of these.
# Use it with:  fedlora client --policy policy.toml
"""


class BasePolicy(Section):
    """Which base models may be loaded."""

    models: Patterns = ANY
    """Permitted `model.name`: builtin names, hub ids or folders. Code that comes with a model
    is never run, whatever stands here."""
    fingerprints: Patterns = ANY
    """Permitted fingerprints of the loaded base (SHA-256, see `fedlora inspect`)."""


class WorkPolicy(Section):
    """What may be trained, and how much of it."""

    tasks: list[Task] = TASKS
    """Permitted `model.task`."""
    methods: Patterns = ANY
    """Permitted `adapter.method`."""
    strategies: Patterns = ANY
    """Permitted `federation.strategy`."""
    sources: Patterns = ANY
    """Permitted `data.source`. It matters for a client that has no data of its own
    (`--data`): then the job names what is read on this machine."""
    devices: Patterns = ANY
    """Permitted devices, e.g. "cuda:1"."""
    max_rounds: Positive = 10_000
    """Most rounds of a run."""
    max_local_steps: Positive = 1_000_000
    """Most optimiser steps of a round."""
    max_trial_steps: Positive = 1_000_000
    """Most optimiser steps of the trial before a round (strategies that choose rank slots)."""
    max_rank: Positive = 512
    """Highest rank of the adapter."""
    max_batch_size: Positive = 4096
    """Most examples of a forward pass, in training and in evaluation."""
    max_accumulation: Positive = 4096
    """Most micro-batches of an optimiser step."""
    max_length: Positive = 131_072
    """Longest example in tokens."""
    max_threads: Positive = 1024
    """Most CPU threads."""
    max_loaders: Annotated[int, Field(ge=0)] = 16
    """Most loader processes."""


class TransferPolicy(Section):
    """What may be sent and fetched."""

    max_down_mib: NonNegative = 16_384.0
    """Most MiB fetched in a round."""
    max_up_mib: NonNegative = 8192.0
    """Most MiB sent in a round."""
    max_folds: Annotated[int, Field(ge=0, le=MAX_FOLD_VERSIONS)] = MAX_FOLD_VERSIONS
    """Most changes of the base weights that one round brings."""
    max_fold_rank: Annotated[int, Field(ge=0)] = 16_384
    """Highest rank of one of these in a layer: at most the ranks of all clients together."""


class PrivacyPolicy(Section):
    """Least differential privacy. Any limit that is on refuses a job without it."""

    unit: Literal["record", "client"] | None = None
    """Unit that must be protected."""
    max_epsilon: Annotated[float, Field(gt=0.0)] | None = None
    """Largest epsilon of the whole run."""
    max_delta: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    """Largest delta."""
    min_noise: Annotated[float, Field(gt=0.0)] | None = None
    """Smallest noise multiplier."""
    budget_epsilon: Annotated[float, Field(gt=0.0)] | None = None
    """Largest epsilon of all runs together on one data set of this site, by its ledger."""
    budget_delta: Annotated[float, Field(gt=0.0, lt=1.0)] = 1e-6
    """The delta that goes with it."""

    def misfits(self, asked: PrivacySection | None) -> list[str]:
        """What a job's [privacy] table lacks."""
        limits = {
            key: limit
            for key in ("unit", "max_epsilon", "max_delta", "min_noise", "budget_epsilon")
            if (limit := getattr(self, key)) is not None
        }
        if asked is None:
            return [
                f"the job trains without differential privacy; this site's policy demands "
                f"privacy.{key} = {limit!r}: such a job cannot run here"
                for key, limit in limits.items()
            ]
        if limits and asked.noise == "test":
            return [
                'privacy.noise = "test" is asked, which is not private; this site\'s policy '
                'demands privacy: ask for "os" or "secure"'
            ]
        # a record is the smaller unit, so that only it is protected from the server too
        problems = []
        if self.unit is not None and asked.unit != self.unit:
            problems.append(
                f"privacy.unit = {asked.unit!r} is asked; this site's policy demands "
                f"privacy.unit = {self.unit!r}"
            )
        for key in ("epsilon", "delta"):
            limit = limits.get(f"max_{key}")
            found = getattr(asked, key)
            if limit is not None and (found is None or found > limit):
                problems.append(
                    f"privacy.{key} = {found} is asked; this site's policy permits "
                    f"privacy.max_{key} = {limit:g}: ask for that or less"
                )
        needs_record = ("min_noise", "budget_epsilon")
        if asked.unit != "record" and any(key in limits for key in needs_record):
            problems.append(
                f"privacy.unit = {asked.unit!r} is asked, whose noise the server adds; this "
                "site's policy bounds noise or a budget of its own, which needs "
                'privacy.unit = "record"'
            )
        return problems


# key of the policy -> keys of the job that it bounds
NAMES: dict[str, tuple[str, ...]] = {
    "base.models": ("model.name",),
    "work.tasks": ("model.task",),
    "work.methods": ("adapter.method",),
    "work.strategies": ("federation.strategy",),
    "work.sources": ("data.source",),
    "work.devices": ("run.device",),
}
LIMITS: dict[str, tuple[str, ...]] = {
    "work.max_rounds": ("federation.rounds",),
    "work.max_local_steps": ("training.local_steps",),
    "work.max_rank": ("adapter.rank",),
    "work.max_batch_size": ("training.batch_size", "evaluation.batch_size"),
    "work.max_accumulation": ("training.accumulation",),
    "work.max_length": ("data.max_length",),
    "work.max_threads": ("run.threads",),
    "work.max_loaders": ("training.num_workers",),
}


class Policy(Section):
    """The whole policy file; `Policy()` is what holds without one."""

    base: BasePolicy = BasePolicy()
    work: WorkPolicy = WorkPolicy()
    transfer: TransferPolicy = TransferPolicy()
    privacy: PrivacyPolicy = PrivacyPolicy()

    def check_job(self, job: Job) -> None:
        """Accepts a job that asks for nothing that is not permitted.

        Args:
            job: as it will be worked on here, i.e. with the site's own device and data.

        Raises:
            PolicyError: all refusals together.
        """
        problems = []
        for key, asked in NAMES.items():
            for field in asked:
                problems += self._unnamed(field, _at(job, field), key)
        for key, asked in LIMITS.items():
            for field in asked:
                problems += self._above(field, _at(job, field), key)
        _refuse([*problems, *self.privacy.misfits(job.privacy)])

    def check_noise(self, noise_multiplier: float) -> None:
        """Accepts noise of this size in the client's own training.

        Raises:
            PolicyError: it is less than the site demands.
        """
        least = self.privacy.min_noise
        if least is not None and noise_multiplier < least:
            raise PolicyError(
                f"the job gives a noise multiplier of {noise_multiplier:g} here; this site's "
                f"policy demands privacy.min_noise = {least:g}: ask for a smaller privacy.epsilon"
            )

    def check_base(self, fingerprint: str) -> None:
        """Accepts a base model with this fingerprint.

        Raises:
            PolicyError: it is not among those permitted.
        """
        _refuse(self._unnamed("the loaded base's fingerprint", fingerprint, "base.fingerprints"))

    def check_plan(self, plan: RoundPlan) -> None:
        """Accepts a plan that asks for no more work than is permitted.

        Raises:
            PolicyError: all refusals together.
        """
        _refuse(
            [
                *self._above("plan.round", plan.round, "work.max_rounds"),
                *self._above("plan.local_steps", plan.local_steps, "work.max_local_steps"),
                *self._above("plan.trial_steps", plan.trial_steps, "work.max_trial_steps"),
                *self._above("plan.rank", plan.rank, "work.max_rank"),
            ]
        )

    def check_broadcast(self, broadcast: Broadcast) -> None:
        """Accepts a broadcast whose plan and folds are permitted; to be asked before fetching.

        Raises:
            PolicyError: not permitted.
        """
        self.check_plan(broadcast.plan)
        folds = broadcast.fold_ranks
        highest = max((rank for ranks in folds.values() for rank in ranks), default=0)
        _refuse(
            [
                *self._above("number of folds", len(folds), "transfer.max_folds"),
                *self._above("rank of a fold", highest, "transfer.max_fold_rank"),
            ]
        )

    def check_bytes(self, *, down: int = 0, up: int = 0) -> None:
        """Accepts so many bytes in one round.

        Raises:
            PolicyError: more than is permitted.
        """
        _refuse(
            [
                *self._above("MiB to fetch", down / MIB, "transfer.max_down_mib"),
                *self._above("MiB to send", up / MIB, "transfer.max_up_mib"),
            ]
        )

    def _unnamed(self, field: str, found: str, key: str) -> list[str]:
        permitted: Sequence[str] = _at(self, key)
        if any(fnmatchcase(found, pattern) for pattern in permitted):
            return []
        return [
            f"{field} = {found[:200]!r} is asked; this site's policy permits {key} = "
            f"{list(permitted)}: ask for one of these, or add it to the policy"
        ]

    def _above(self, field: str, found: float, key: str) -> list[str]:
        limit: float = _at(self, key)
        if found <= limit:
            return []
        return [
            f"{field} = {found} is asked; this site's policy permits {key} = {limit}: ask for "
            "less, or raise it in the policy"
        ]


def load_policy(path: Path | None) -> Policy:
    """The policy in a TOML file; without one, the default policy.

    Raises:
        ConfigError: missing, or not a policy; all problems together.
    """
    if path is None:
        return Policy()
    return parse_table(Policy, read_toml(path, "policy file", "fedlora init --policy"))


def render_policy() -> str:
    """TOML text with every field, its documentation and its default."""
    return render_tables(Policy, HEADING)


def _at(tree: Section, key: str) -> Any:
    section, field = key.split(".")
    return getattr(getattr(tree, section), field)


def _refuse(problems: Sequence[str]) -> None:
    if problems:
        raise PolicyError(*problems)
