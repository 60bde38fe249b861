"""The `fedlora` command. Each verb imports what it needs only when it is called."""

import sys
from pathlib import Path
from typing import Annotated, Any

import click
import typer
from typer.core import TyperGroup

from fedlora.cli.certs import app as certs_app
from fedlora.cli.strategy import app as strategy_app
from fedlora.errors import EXIT_INTERRUPTED, EXIT_USAGE, FedloraError


class Verbs(TyperGroup):
    """The verbs; Ctrl-C in any of them ends in a message and exit code 130."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            # further out, click would turn it into a silent exit
            print("interrupted", file=sys.stderr)
            sys.exit(EXIT_INTERRUPTED)


app = typer.Typer(
    name="fedlora",
    cls=Verbs,
    help="Federated fine-tuning of transformers with low-rank adapters.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

app.add_typer(strategy_app, name="strategy")
app.add_typer(certs_app, name="certs")

Override = Annotated[
    list[str] | None,
    typer.Option("-o", "--override", help="Change one value of the job: section.key=value."),
]
Client = Annotated[
    str | None, typer.Option(help="Whose adapter, when every client has one of its own.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


@app.command()
def init(
    path: Annotated[
        Path | None, typer.Argument(help="Where to write it; by default job.toml here.")
    ] = None,
    policy: Annotated[
        bool, typer.Option("--policy", help="Write the policy.toml of a site instead.")
    ] = False,
) -> None:
    """Write a commented job.toml (or policy.toml) with every option and its default.

    Example: fedlora init job.toml
    """
    from fedlora.cli.init import run_init

    run_init(path, policy=policy)


@app.command()
def simulate(
    job: Annotated[Path | None, typer.Argument(help="Job file; without it the quickstart.")] = None,
    out: Annotated[Path | None, typer.Option(help="Run folder; must not exist.")] = None,
    override: Override = None,
    json: AsJson = False,
) -> None:
    """Run a whole federation on this machine.

    Example: fedlora simulate job.toml --out runs/first -o federation.rounds=3
    """
    from fedlora.cli.simulate import run_simulate

    run_simulate(job, out, override or [], as_json=json)


@app.command()
def resume(
    folder: Annotated[Path, typer.Argument(help="Run folder.")],
    json: AsJson = False,
) -> None:
    """Continue a run from its last committed round.

    Example: fedlora resume runs/first
    """
    from fedlora.cli.simulate import run_resume

    run_resume(folder, as_json=json)


@app.command()
def compare(
    job: Annotated[Path, typer.Argument(help="Job file.")],
    out: Annotated[Path, typer.Option(help="Folder for the comparison; continued if it exists.")],
    strategies: Annotated[
        str | None, typer.Option(help="Names, by comma; without any, and no variant, fedit.")
    ] = None,
    variant: Annotated[
        list[str] | None,
        typer.Option(
            help="One more contender: 'label: section.key=value ...', split as a shell would."
        ),
    ] = None,
    baselines: Annotated[str, typer.Option(help="local, centralised or both, by comma.")] = "",
    seeds: Annotated[int, typer.Option(min=1, help="Number of seeds, from run.seed up.")] = 1,
    skew: Annotated[
        str, typer.Option(help="Dirichlet alphas, by comma; one block of results each.")
    ] = "",
    equal: Annotated[
        str, typer.Option(help="Read scores at equal rounds, or at equal bytes.")
    ] = "rounds",
    override: Override = None,
    json: AsJson = False,
) -> None:
    """Compare strategies, variants and baselines over seeds and levels of skew.

    Differences are paired by seed, to the contender named first (strategies before variants).

    Example: fedlora compare job.toml --strategies fedit,ffa-lora --seeds 3 --skew 0.1,10 --out cmp
    """
    from fedlora.cli.compare import run_compare

    run_compare(
        job,
        out,
        strategies,
        baselines,
        seeds,
        override or [],
        variants=variant or [],
        skew=skew,
        equal=equal,
        as_json=json,
    )


@app.command()
def evaluate(
    path: Annotated[Path, typer.Argument(help="Run folder or adapter folder.")],
    model: Annotated[str | None, typer.Option(help="Base model, if not the recorded one.")] = None,
    data: Annotated[
        Path | None, typer.Option(help="Data file, if not the run's test data.")
    ] = None,
    client: Client = None,
    override: Override = None,
    json: AsJson = False,
) -> None:
    """Measure an adapter, and its base, on data.

    Example: fedlora evaluate runs/first --data test.jsonl --json
    """
    from fedlora.cli.evaluate import run_evaluate

    run_evaluate(path, model, data, override or [], client=client, as_json=json)


@app.command()
def export(
    path: Annotated[Path, typer.Argument(help="Run folder or adapter folder.")],
    out: Annotated[Path, typer.Option(help="Folder to write; must not exist.")],
    format: Annotated[str, typer.Option("--format", help="peft or merged.")] = "peft",
    model: Annotated[str | None, typer.Option(help="Base model, if not the recorded one.")] = None,
    client: Client = None,
) -> None:
    """Write an adapter for use elsewhere: PEFT format, or merged into its base model.

    Example: fedlora export runs/first --format merged --out merged-model
    """
    from fedlora.cli.export import run_export

    run_export(path, out, format, model, client)


@app.command()
def merge(
    adapters: Annotated[
        list[Path], typer.Argument(help="Run folders, adapter folders or folders that PEFT saved.")
    ],
    strategy: Annotated[
        str,
        typer.Option(
            help="task-arithmetic, ties, dare, regmean, lora-lego, flexlora, fedex-lora or flora."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder to write; must not exist.")],
    rank: Annotated[int | None, typer.Option(min=1, help="Rank of the merged adapter.")] = None,
    weights: Annotated[
        str | None, typer.Option(help="One number per adapter, by comma; equal by default.")
    ] = None,
    option: Annotated[
        list[str] | None, typer.Option(help="Change one option of the strategy: key=value.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Base model, if not the recorded one.")] = None,
    data: Annotated[
        list[Path] | None,
        typer.Option(help="For regmean: texts (.jsonl), one file for all adapters or one each."),
    ] = None,
    seed: Annotated[int, typer.Option(help="For dare and lora-lego.")] = 0,
    json: AsJson = False,
) -> None:
    """Merge trained adapters of one base into one, in PEFT format, without training.

    Example: fedlora merge law medicine --strategy ties --rank 16 --weights 2,1 --out both
    """
    from fedlora.cli.merge import run_merge

    run_merge(
        adapters,
        strategy,
        rank=rank,
        weights=weights,
        options=option or [],
        model=model,
        data=data or [],
        seed=seed,
        out=out,
        as_json=json,
    )


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="Run folder, adapter folder or .safetensors file.")],
    json: AsJson = False,
) -> None:
    """Say what an adapter, delta or run folder is.

    Example: fedlora inspect runs/first/adapter
    """
    from fedlora.cli.inspect import run_inspect

    run_inspect(path, as_json=json)


@app.callback(invoke_without_command=True)
def options(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Federated fine-tuning of transformers with low-rank adapters."""
    if version:
        from fedlora import __version__

        typer.echo(__version__)
        raise typer.Exit


def run() -> None:
    """The console script: every expected error ends in one message and an exit code."""
    try:
        app()
    except FedloraError as e:
        for line in str(e).splitlines():
            print(f"error: {line}", file=sys.stderr)
        sys.exit(e.exit_code)
    except BrokenPipeError:
        sys.exit(EXIT_USAGE)
    except OSError as e:  # a path that is too long or may not be read; its text names the path
        print(f"error: {e}", file=sys.stderr)
        sys.exit(EXIT_USAGE)
