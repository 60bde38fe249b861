"""What a job's choices do to record-level privacy: void it, cost budget, or nothing."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from fedlora.config.job import Job
from fedlora.errors import ConfigError

Verdict = Literal["refused", "charged", "free", "not covered"]


@dataclass(frozen=True)
class Judgement:
    """One choice of a job and what it does.

    Attributes:
        choice: key and value.
        verdict: "refused" voids the guarantee, "charged" is paid for out of the budget, "free"
            costs nothing, "not covered" is outside what the guarantee speaks of.
        why: the reason; for a refusal, also what to choose instead.
    """

    choice: str
    verdict: Verdict
    why: str


def judge(job: Job) -> list[Judgement]:
    """Every choice of a job that bears on record-level privacy; none without it.

    The strategy and its wrappers are judged by their own `privacy` (`Strategy.check`).
    """
    if job.privacy is None or job.privacy.unit != "record":
        return []
    return [found for rule in RULES if (found := rule(job)) is not None]


def check_private(job: Job) -> None:
    """Refuses what would void the guarantee.

    Raises:
        ConfigError: all reasons together.
    """
    refused = [found for found in judge(job) if found.verdict == "refused"]
    if refused:
        raise ConfigError(*(f"{found.choice}: {found.why}" for found in refused))


def _packing(job: Job) -> Judgement | None:
    if not job.data.packed or job.model.task != "causal-lm":
        return None
    if job.data.format not in ("auto", "text"):
        return None
    return Judgement(
        "data.packed = true",
        "refused",
        "documents are joined into blocks, so that one is part of several examples and an example "
        'holds several; with privacy.unit = "record" set data.packed = false',
    )


def _engine(job: Job) -> Judgement | None:
    if job.run.engine != "ray":
        return None
    return Judgement(
        'run.engine = "ray"',
        "refused",
        'its workers keep no privacy ledgers; set run.engine = "local"',
    )


def _checkpointing(job: Job) -> Judgement | None:
    if not job.training.gradient_checkpointing:
        return None
    assert job.privacy is not None
    if job.privacy.per_sample == "hooks":
        return Judgement(
            "training.gradient_checkpointing = true",
            "refused",
            "Opacus' hooks do not see activations that are computed again; set "
            'privacy.per_sample = "bookkeeping", or do without',
        )
    return Judgement(
        "training.gradient_checkpointing = true",
        "free",
        "book-keeping sees every gradient once, however often activations are computed",
    )


def _hostile(job: Job) -> Judgement | None:
    if not any(hostile.kind == "label-flip" for hostile in job.scenario.hostile):
        return None
    return Judgement(
        'scenario.hostile, kind = "label-flip"',
        "not covered",
        "the ledger names the data as they were read, before labels were flipped",
    )


def _metrics(job: Job) -> Judgement:
    assert job.privacy is not None
    if job.privacy.metrics == "noisy":
        return Judgement(
            'privacy.metrics = "noisy"',
            "charged",
            "a noisy sum over the validation examples in every round, by the Gaussian mechanism",
        )
    return Judgement('privacy.metrics = "none"', "free", "clients say nothing of their own loss")


def _adapter(job: Job) -> Judgement:
    return Judgement(
        f'adapter.method = "{job.adapter.method}"',
        "free",
        "every method here starts from seeds and the frozen weights alone; starting from "
        "statistics of the data (EVA, LoRA-GA, LoRA-SB) would have to be paid for",
    )


def _start(job: Job) -> Judgement | None:
    if job.adapter.start is None:
        return None
    return Judgement(
        f'adapter.start = "{job.adapter.start}"',
        "not covered",
        "what that adapter reveals of the same data is not part of this run's budget",
    )


def _optimizer(job: Job) -> Judgement:
    return Judgement(
        f'training.optimizer = "{job.training.optimizer}"',
        "free",
        "moments, weight decay, schedules, proximal terms and control variates see noisy "
        "gradients only",
    )


def _dropout(job: Job) -> Judgement | None:
    if not job.adapter.dropout:
        return None
    return Judgement(
        f"adapter.dropout = {job.adapter.dropout:g}",
        "refused",
        "masks depend on an example's place in the batch and on the longest example there, so "
        "that one example would change the gradients of others; set adapter.dropout = 0",
    )


def _bucketed(job: Job) -> Judgement | None:
    if not job.training.length_bucketed:
        return None
    return Judgement(
        "training.length_bucketed = true",
        "refused",
        "every example must enter a batch by chance alone, whatever its length; set "
        "training.length_bucketed = false",
    )


def _compiled(job: Job) -> Judgement | None:
    if not job.training.compile:
        return None
    return Judgement(
        "training.compile = true",
        "refused",
        "gradients of single examples are not seen in compiled layers; set "
        "training.compile = false",
    )


def _noise(job: Job) -> Judgement | None:
    assert job.privacy is not None
    if job.privacy.noise != "test":
        return None
    return Judgement(
        'privacy.noise = "test"',
        "not covered",
        "the noise can be drawn again by anybody who has the job: this run is NOT PRIVATE, and no "
        "epsilon is reported",
    )


def _evaluation(job: Job) -> Judgement:
    where = "the clients' validation parts" if job.data.test is None else f'"{job.data.test}"'
    return Judgement(
        f"data.test = {job.data.test!r}",
        "not covered",
        f"figures are measured on {where}, which are not trained on and get no protection",
    )


RULES: tuple[Callable[[Job], Judgement | None], ...] = (
    _packing,
    _engine,
    _checkpointing,
    _metrics,
    _adapter,
    _start,
    _optimizer,
    _dropout,
    _bucketed,
    _compiled,
    _noise,
    _hostile,
    _evaluation,
)
