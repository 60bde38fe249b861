"""`fedlora privacy ledger`: what a ledger says, and a new budget by an operator's own decision."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import typer

from fedlora.errors import LedgerError
from fedlora.privacy.accounting import Event, epsilon, merged
from fedlora.privacy.budget import Budget
from fedlora.privacy.ledger_entry import ADJACENCY
from fedlora.privacy.ledger_file import (
    LedgerFile,
    fold,
    known,
    known_here,
    read_lines,
    refusal,
    set_aside,
)
from fedlora.privacy.ledger_state import LedgerState


def run_ledger(path: Path, *, as_json: bool) -> None:
    """Prints every ledger in `path`.

    Raises:
        LedgerError: there is none, or one is not whole.
    """
    found, problems = [], []
    for folder in ledger_folders(path):
        try:
            found.append(describe(folder))
        except LedgerError as e:
            problems.append(str(e))
            found.append({"folder": str(folder), "whole": False, "problem": str(e)})
    if as_json:
        typer.echo(json.dumps({"ledgers": found}))
    else:
        whole = ["\n".join(_lines(each)) for each in found if each["whole"]]
        typer.echo("\n\n".join(whole))
    if problems:
        raise LedgerError("\n".join(problems))


def begin_new_budget(folder: Path) -> None:
    """Puts a ledger aside and says where.

    Raises:
        LedgerError: none was ever kept here, or a process holds it.
    """
    if known(folder) is None and not (folder / "ledger").exists():
        raise LedgerError(f"{folder} is no privacy ledger, and none is known to have been here")
    file = LedgerFile(folder, wait_s=5.0)
    try:
        with file.locked():
            aside = set_aside(folder)
    finally:
        file.close()
    kept = f"kept in {aside}" if aside else "nothing was left to keep"
    typer.echo(f"the next run begins a new budget on these data; of the old ledger, {kept}")
    typer.echo("what was spent under it stays spent: the two add up, and no figure says so")


def ledger_folders(path: Path) -> list[Path]:
    """The folders of all ledgers in `path`, lost ones too, or `path` itself if it is one.

    Raises:
        LedgerError: there is none.
    """
    if (path / "ledger").exists() or (path / "head").exists() or known(path) == "":
        return [path]
    found = {each.parent for name in ("ledger", "head") for each in path.glob(f"*/{name}")}
    found |= {path / name for name in known_here(path)}
    if not found:
        raise LedgerError(f"{path} holds no privacy ledger; expected the folder of one, or of all")
    return sorted(found)


def describe(folder: Path) -> dict[str, Any]:
    """What a ledger says; reading it changes nothing.

    Raises:
        LedgerError: it is not whole.
    """
    read = read_lines(folder)
    if read is None:
        raise refusal(folder, "is missing")
    lines, intact = read
    state = fold(folder, lines)
    budgets = _budgets(state)
    total = _spent(state.charged(), budgets.get(None))
    return {
        "kind": "privacy ledger",
        "folder": str(folder),
        "dataset": state.header.dataset,
        "unit": state.header.unit,
        "adjacency": ADJACENCY,
        "created": state.header.created,
        "put_aside": ".aside-" in folder.name,
        "follows": state.header.follows or None,
        "entries": len(state.entries),
        "head": {"entry": state.head[0], "sha256": state.head[1]},
        "whole": True,
        "torn_tail": intact is not None,
        "total": total,
        "runs": {run: _spent(state.charged(run), budgets.get(run)) for run in state.runs()},
        "history": [_row(state, seq) for seq in state.reservations],
    }


def _budgets(state: LedgerState) -> dict[str | None, Budget | None]:
    """Run -> the budget that its last reservation was checked against; None is the site."""
    found: dict[str | None, Budget | None] = {}
    for held in state.reservations.values():
        run, site = held.entry.budgets
        found[held.entry.release.run] = run
        # without a limit of the site, all runs together are measured at the last run's delta
        found[None] = site or (run and Budget(None, run.delta))
    return found


def _spent(events: list[Event], budget: Budget | None) -> dict[str, Any]:
    if budget is None:
        return {"rdp": 0.0, "prv": 0.0, "delta": None, "budget": None, "remaining": None}
    rdp = epsilon(events, budget.delta)
    limit = budget.epsilon
    return {
        "rdp": rdp,
        "prv": epsilon(events, budget.delta, "prv"),
        "delta": budget.delta,
        "budget": limit,
        "remaining": None if limit is None else max(limit - rdp, 0.0),
        "steps": sum(event.steps for event in events),
    }


def _row(state: LedgerState, seq: int) -> dict[str, Any]:
    held = state.reservations[seq]
    return {
        "entry": seq,
        "time": held.entry.time,
        **dataclasses.asdict(held.entry.release),
        "status": held.status,
        "charged": [dataclasses.asdict(event) for event in merged(held.events, kinds=True)],
        "details": dict(held.entry.details),
    }


def _lines(found: dict[str, Any]) -> list[str]:
    lines = [
        f"privacy ledger of data set {found['dataset'][:16]}, since {found['created']}",
        f"  protects         one {found['unit']} ({found['adjacency']})",
        f"  entries          {found['entries']}, whole; head {found['head']['sha256'][:16]}",
        f"  spent in all     {_figures(found['total'])}",
    ]
    if found["torn_tail"]:
        lines.append("  torn tail        the last entry was cut off; it counts, by the head file")
    if found["put_aside"]:
        lines.append("  put aside        a new budget was begun on these data")
    if found["follows"]:
        lines.append(
            f"  follows          {found['follows']}, whose spending is not in these figures"
        )
    for run, spent in found["runs"].items():
        lines.append(f"  run {run:<12} {_figures(spent)}")
    lines += ["", f"  {'entry':>5}  {'run':<12} {'round':>5} {'try':>3}  {'status':<9} charged"]
    for row in found["history"]:
        events = ", ".join(
            f"{e['steps']} x (q {e['rate']:.4g}, noise {e['noise']:.4g})" for e in row["charged"]
        )
        lines.append(
            f"  {row['entry']:>5}  {row['run']:<12} {row['round']:>5} {row['attempt']:>3}  "
            f"{row['status']:<9} {events or 'nothing'}"
        )
    return lines


def _figures(spent: dict[str, Any]) -> str:
    if spent["delta"] is None:
        return "nothing"
    limit = "no limit" if spent["budget"] is None else f"of {spent['budget']:g}"
    left = "" if spent["remaining"] is None else f", {spent['remaining']:.4g} left"
    return (
        f"epsilon {spent['rdp']:.4g} {limit}{left} (RDP; PRV says {spent['prv']:.4g}) "
        f"at delta {spent['delta']:.3g}"
    )
