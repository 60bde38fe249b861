"""`fedlora privacy plan`: the schedule of a job, and the plan in words."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer

from fedlora.config.job import Job
from fedlora.config.load import load_job
from fedlora.config.privacy import PrivacySection
from fedlora.errors import ConfigError
from fedlora.privacy.accounting import default_delta
from fedlora.privacy.judge import judge
from fedlora.privacy.plan import Plan, Schedule, make_plan, noise_norm, record_schedule
from fedlora.privacy.scope import FEW_CLIENTS, NOT_COVERED
from fedlora.storage import storage_errors, write_atomic

_DEFAULT = (1.0, 3.0, 8.0)
# numbers that a client sends: a small core matrix, and adapters of a large model
_SIZES = (10_000, 1_000_000)


def run_plan(
    path: Path | None,
    records: int | None,
    clients: int | None,
    budgets: str,
    out: Path | None,
    overrides: Sequence[str],
    *,
    as_json: bool,
) -> None:
    """Prints what budgets cost a job.

    Raises:
        ConfigError: the job does not say enough, or a budget is no number.
        BudgetExhausted: no noise fits a budget.
    """
    # also what the job is checked against, e.g. how many of them a round may take
    enrolled = [f"partition.clients={clients}"] if clients else []
    job = load_job(path, [*overrides, *enrolled])
    privacy = job.privacy or PrivacySection(epsilon=_DEFAULT[0])
    schedule = (
        _of_records(job, privacy, records)
        if privacy.unit == "record"
        else _of_clients(job, privacy)
    )
    plan = make_plan(schedule, _budgets(budgets, job))
    choices = judge(job.model_copy(update={"privacy": privacy}))
    found = {**_to_json(plan), "choices": [dataclasses.asdict(choice) for choice in choices]}
    if out is not None:
        from fedlora.report.plan_figure import plan_figure
        from fedlora.report.theme import to_png

        with storage_errors(out):
            out.mkdir(parents=True, exist_ok=True)
        write_atomic(out / "plan.json", json.dumps(found, indent=1).encode() + b"\n")
        write_atomic(out / "plan.png", to_png(plan_figure(plan)))
    lines = [*_lines(plan), "", *(f"{c.verdict}: {c.choice}: {c.why}" for c in choices)]
    typer.echo(json.dumps(found) if as_json else "\n".join(lines))


def _of_records(job: Job, privacy: PrivacySection, records: int | None) -> Schedule:
    if records is None:
        raise ConfigError(
            "the number of a client's training examples is not known; give it: --records N"
        )
    if not job.training.local_steps:
        raise ConfigError("training.local_steps is 0: nothing is trained, so nothing is spent")
    return record_schedule(job, privacy, records)


def _of_clients(job: Job, privacy: PrivacySection) -> Schedule:
    enrolled = privacy.population or job.partition.clients
    if not enrolled:
        raise ConfigError("the number of enrolled clients is not known; give it: --clients N")
    return Schedule(
        unit="client",
        units=enrolled,
        batch=float(min(enrolled, job.federation.clients_per_round or enrolled)),
        rounds=job.federation.rounds,
        steps=1,
        delta=privacy.delta or default_delta(enrolled),
        amplified=privacy.client_sampling == "poisson",
    )


def _budgets(text: str, job: Job) -> list[float]:
    if not text:
        given = job.privacy.epsilon if job.privacy else None
        return [given] if given else list(_DEFAULT)
    try:
        return sorted({float(word) for word in text.split(",")})
    except ValueError:
        raise ConfigError(
            f"--epsilon is {text!r}; expected numbers by comma, e.g. --epsilon 1,3,8"
        ) from None


def _to_json(plan: Plan) -> dict[str, Any]:
    schedule = plan.schedule
    return {
        "unit": schedule.unit,
        "adjacency": f"add or remove one {schedule.unit}",
        "units": schedule.units,
        "expected_batch": schedule.batch,
        "rate": schedule.rate,
        "rounds": schedule.rounds,
        "steps": schedule.rounds * schedule.steps,
        "delta": schedule.delta,
        "empty_batch_probability": schedule.empty,
        "accountants": {"gate": "rdp", "report": "prv"},
        "budgets": [dataclasses.asdict(row) for row in plan.rows],
        "trade_off": [
            {"epsilon": budget, "batch": batch, "per_coordinate": size}
            for budget, sizes in plan.trade_off.items()
            for batch, size in zip(plan.batches, sizes, strict=True)
        ],
        "spent": [
            {"epsilon": budget, "round": number, "rdp": rdp, "prv": prv}
            for budget, way in plan.spent.items()
            for number, rdp, prv in way
        ],
        "warnings": _warnings(plan),
        "not_covered": list(NOT_COVERED[schedule.unit]),
    }


def _lines(plan: Plan) -> list[str]:
    s = plan.schedule
    things = "examples" if s.unit == "record" else "clients"
    whom = (
        "from everybody but the client itself, the server included"
        if s.unit == "record"
        else "from everybody but the server"
    )
    how = f"sampling rate {s.rate:.4g}" if s.amplified else "no amplification by sampling"
    lines = [
        f"one {s.unit} of {s.units} is protected {whom} (add or remove one {s.unit})",
        f"expected batch {s.batch:g} {things}, {how}, {s.rounds} rounds of {s.steps} noisy steps",
        f"delta {s.delta:.3g}; RDP gates, PRV is the tighter figure that reports show",
        f"a step takes nobody with probability {s.empty:.2g}; it is noise alone, and is paid for",
        "",
        " epsilon  noise multiplier      RDP      PRV  noise per coordinate",
    ]
    lines += [
        f"{row.budget:>8g} {row.noise:>17.4g} {row.rdp:>8.4g} {row.prv:>8.4g} "
        f"{row.per_coordinate:>15.3g} clip"
        for row in plan.rows
    ]
    heading = "".join(f"{f'epsilon {row.budget:g}':>14}" for row in plan.rows)
    lines += [
        "",
        "noise per coordinate, in units of the clip norm, by expected batch",
        f"{'batch':>8}{heading}",
    ]
    for place, batch in enumerate(plan.batches):
        cells = "".join(f"{plan.trade_off[row.budget][place]:>14.3g}" for row in plan.rows)
        lines.append(f"{batch:>8g}{cells}{'  planned' if batch == s.batch else ''}")
    lines += ["", *(f"warning: {text}" for text in _warnings(plan))]
    return [*lines, "not covered: " + "; ".join(NOT_COVERED[s.unit])]


def _warnings(plan: Plan) -> list[str]:
    s, strictest = plan.schedule, plan.rows[0]
    found = []
    if s.unit == "client" and s.units < FEW_CLIENTS:
        norms = ", ".join(f"{noise_norm(strictest, size):.3g} for {size:,}" for size in _SIZES)
        found.append(
            f"{s.units} clients are few: at epsilon {strictest.budget:g} the noise on an update is "
            f"so many times the clip norm: {norms} numbers. With fewer than {FEW_CLIENTS} clients "
            'protect records instead: privacy.unit = "record"'
        )
    if s.empty > 1e-3:
        found.append(
            f"{s.empty:.2%} of steps are expected to be empty; a larger batch wastes less budget"
        )
    return found
