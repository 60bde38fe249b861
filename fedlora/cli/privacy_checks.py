"""`fedlora privacy selftest` and `audit`"""

import json as jsonlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedlora.errors import ConfigError, RunFailed

if TYPE_CHECKING:
    from fedlora.config.job import Job
    from fedlora.privacy.audit.subject import Subject

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Override = Annotated[
    list[str] | None,
    typer.Option("-o", "--override", help="Change one value of the job: section.key=value."),
]
# tokens of the made-up texts; classes and pictures come in as many
_LENGTHS = (5, 9, 12, 3, 7, 6)


def add_checks(app: typer.Typer) -> None:
    """Adds both verbs to `fedlora privacy`."""
    app.command()(selftest)
    app.command()(audit)


def selftest(
    job: Annotated[Path | None, typer.Argument(help="Job file; without it the quickstart.")] = None,
    override: Override = None,
    json: AsJson = False,
) -> None:
    """Try the private training of a job's own model, with made-up examples.

    Ends with exit code 3, and the name of what failed, if it is not as private as it says.

    Example: fedlora privacy selftest job.toml
    """
    run_selftest(job, override or [], as_json=json)


def audit(
    seeds: Annotated[int, typer.Option(min=1, help="Number of audited runs.")] = 1,
    json: AsJson = False,
) -> None:
    """Guess from outside who took part, and refute the claimed epsilon if that goes too well.

    Example: fedlora privacy audit --seeds 8
    """
    run_audit(seeds, as_json=json)


def run_selftest(path: Path | None, overrides: Sequence[str], *, as_json: bool) -> None:
    """Consults every oracle on the job's model.

    Raises:
        ConfigError: the job has no record-level privacy, or voids it.
        RunFailed: an oracle failed.
    """
    from fedlora.cli.simulate import read_job
    from fedlora.privacy.audit.oracles import consult

    failed, rows = [], []
    for found in consult(_subject(read_job(path, overrides))):
        rows.append(
            {
                "oracle": found.oracle,
                "passed": found.passed,
                "figure": found.figure if math.isfinite(found.figure) else None,
                "tolerance": found.tolerance,
                "detail": found.detail,
            }
        )
        if not found.passed:
            failed.append(found)
        if not as_json:
            mark = "passed" if found.passed else "FAILED"
            typer.echo(
                f"{mark}  {found.oracle:<18}  {found.figure:8.3g} of {found.tolerance:<8.3g}  "
                f"{found.detail}"
            )
    if as_json:
        typer.echo(jsonlib.dumps({"passed": not failed, "oracles": rows}))
    if failed:
        raise RunFailed(
            "\n".join(f"oracle {f.oracle!r} failed: {f.detail}" for f in failed)
            + "\ndo not train on private data with this model"
        )


def run_audit(seeds: int, *, as_json: bool) -> None:
    """One audited run for each seed.

    Raises:
        RunFailed: a claim was refuted.
    """
    from fedlora.privacy.audit.one_run import audit as audit_once

    found = []
    for seed in range(seeds):
        one = audit_once(seed)
        found.append(one)
        if not as_json:
            typer.echo(
                f"seed {seed}: {one.right} of {one.guesses} guesses right: epsilon >= "
                f"{one.bound:.2f}; claimed {one.claimed:.2f}"
            )
    refuted = [seed for seed, one in enumerate(found) if one.falsified]
    if as_json:
        rows = [{**vars(one), "falsified": one.falsified} for one in found]
        typer.echo(jsonlib.dumps({"passed": not refuted, "runs": rows}))
    if refuted:
        raise RunFailed(
            f"the one-run audit refuted the claimed epsilon with seed {refuted[0]} "
            f"({len(refuted)} of {seeds} seeds; one in 20 may by chance)"
        )


def _subject(job: "Job") -> "Subject":
    from fedlora.config.privacy import PrivacySection
    from fedlora.models.loaded import load
    from fedlora.privacy.audit.subject import Subject
    from fedlora.privacy.judge import check_private
    from fedlora.privacy.made_up import made_up
    from fedlora.privacy.noise import noise_source
    from fedlora.privacy.sampling import secret_uniform, seeded_uniform

    privacy = job.privacy or PrivacySection(noise_multiplier=1.0)
    if privacy.unit != "record":
        raise ConfigError(
            f'privacy.unit = "{privacy.unit}": the selftest tries the training of clients; '
            'set privacy.unit = "record"'
        )
    check_private(job)
    loaded = load(job)
    like = next(iter(loaded.data.clients.values())).train[0]
    longest = max(2, job.data.max_length)
    test = privacy.noise == "test"
    return Subject(
        adapted=loaded.adapted,
        examples=[
            made_up(loaded.adapted, like, number, min(length, longest))
            for number, length in enumerate(_LENGTHS)
        ],
        task=job.model.task,
        pad_id=loaded.processor.pad_id,
        factors=tuple(sorted({n for x in loaded.adapted.layers.values() for n in x.factors()})),
        checkpointing=job.training.gradient_checkpointing,
        per_sample=privacy.per_sample,
        source=lambda client, number: noise_source(
            privacy.noise, job.run.seed, "train", client, number, 1
        ),
        uniform=seeded_uniform(job.run.seed, "selftest") if test else secret_uniform,
    )
