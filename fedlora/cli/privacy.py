"""`fedlora privacy`: plan, ledger, selftest and audit"""

from pathlib import Path
from typing import Annotated

import typer

from fedlora.cli.privacy_checks import add_checks

app = typer.Typer(
    help="Plan a budget of differential privacy, see what was spent, and test the promise.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Override = Annotated[
    list[str] | None,
    typer.Option("-o", "--override", help="Change one value of the job: section.key=value."),
]


@app.command()
def plan(
    job: Annotated[Path | None, typer.Argument(help="Job file; without it the default.")] = None,
    records: Annotated[
        int | None, typer.Option(min=1, help='Training examples of a client (unit = "record").')
    ] = None,
    clients: Annotated[
        int | None,
        typer.Option(min=1, help='Enrolled clients (unit = "client"); by default the job\'s.'),
    ] = None,
    epsilon: Annotated[
        str, typer.Option(help="Budgets, by comma; by default the job's, or 1, 3 and 8.")
    ] = "",
    out: Annotated[Path | None, typer.Option(help="Folder for plan.json and plan.png.")] = None,
    override: Override = None,
    json: AsJson = False,
) -> None:
    """Say how much noise a budget needs, before anything is trained.

    Example: fedlora privacy plan job.toml --records 2000 --epsilon 1,3,8
    """
    from fedlora.cli.privacy_plan import run_plan

    run_plan(job, records, clients, epsilon, out, override or [], as_json=json)


@app.command()
def ledger(
    folder: Annotated[Path, typer.Argument(help="One ledger, or the folder of a site's ledgers.")],
    new_budget: Annotated[
        bool, typer.Option(help="Put this ledger aside; its data begin again with nothing spent.")
    ] = False,
    json: AsJson = False,
) -> None:
    """Say what was spent on which data, and whether the ledger is whole.

    Example: fedlora privacy ledger /var/lib/fedlora/privacy
    """
    from fedlora.cli.privacy_ledger import begin_new_budget, run_ledger

    if new_budget:
        begin_new_budget(folder)
    else:
        run_ledger(folder, as_json=json)


add_checks(app)
