"""The `fedlora` command. Each verb imports what it needs only when it is called."""

import sys
from pathlib import Path
from typing import Annotated, Any

import click
import typer
from typer.core import TyperGroup

from fedlora.cli.certs import app as certs_app
from fedlora.cli.privacy import app as privacy_app
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
app.add_typer(privacy_app, name="privacy")

Override = Annotated[
    list[str] | None,
    typer.Option("-o", "--override", help="Change one value of the job: section.key=value."),
]
Client = Annotated[
    str | None, typer.Option(help="Whose adapter, when every client has one of its own.")
]
Certs = Annotated[
    Path | None, typer.Option(help="Folder with ca.crt, and this party's certificate and key.")
]
Insecure = Annotated[bool, typer.Option(help="Plain text: for trials on one machine.")]
Health = Annotated[
    str | None, typer.Option(help="HOST:PORT that answers /health, /ready and /metrics.")
]
LogJson = Annotated[bool, typer.Option(help="Log in JSON, a line each.")]
Server = Annotated[str, typer.Option(help="HOST:PORT of the server.")]
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
    """Continue a run from its last committed round, here or on its server.

    Example: fedlora resume runs/first
    """
    if (folder / "remote.json").is_file():
        from fedlora.cli.run import resume_remote

        resume_remote(folder, as_json=json)
        return
    from fedlora.cli.simulate import run_resume

    run_resume(folder, as_json=json)


@app.command()
def server(
    home: Annotated[Path, typer.Option(help="Folder that outlives the processes.")],
    host: Annotated[str, typer.Option(help="Address to bind to.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port that clients and operators are given.")] = 8443,
    flower_port: Annotated[int, typer.Option(help="Port of Flower's SuperLink.")] = 8000,
    certs: Certs = None,
    insecure: Insecure = False,
    ca: Annotated[
        Path | None, typer.Option(help="The consortium's CA folder: for what it revoked.")
    ] = None,
    enrol: Annotated[
        Path | None,
        typer.Option(help="Sign every client's request in this folder unseen (needs --ca)."),
    ] = None,
    device: Annotated[str, typer.Option(help="Device of the server's evaluations.")] = "cpu",
    allow_plugins: Annotated[
        bool, typer.Option(help="Jobs may bring a strategy's file: code that runs here.")
    ] = False,
    health: Health = None,
    log_json: LogJson = False,
) -> None:
    """Run the server of a consortium until it is told to stop.

    Example: fedlora server --home /var/lib/fedlora --host 0.0.0.0 --certs certs/server
    """
    from fedlora.cli.server import run_server, tls_files
    from fedlora.logs import configure, environment
    from fedlora.server.supervisor import ServerOptions

    configure(log_json)
    tls = tls_files(certs, "server", insecure=insecure)
    run_server(
        ServerOptions(
            home=home,
            host=host,
            port=port,
            flower_port=flower_port,
            tls=tls,
            ca_folder=ca,
            enrol=enrol,
            device=device,
            allow_plugins=allow_plugins,
            health=health,
            logging=environment(log_json),
        )
    )


@app.command()
def client(
    server: Server,
    home: Annotated[Path, typer.Option(help="Folder that outlives the processes.")],
    name: Annotated[
        str | None, typer.Option(help="The client's name; with --partition K, client-00K.")
    ] = None,
    data: Annotated[str | None, typer.Option(help="This site's own data.")] = None,
    partition: Annotated[
        str | None,
        typer.Option(
            help="Which part of the job's own data, from 0; auto: the first that no other client "
            "of this machine has, each in a folder of its own below --home."
        ),
    ] = None,
    certs: Certs = None,
    insecure: Insecure = False,
    enrol: Annotated[
        Path | None,
        typer.Option(help="Ask for a certificate by this shared folder, where the server looks."),
    ] = None,
    policy: Annotated[Path | None, typer.Option(help="What this site permits.")] = None,
    device: Annotated[str, typer.Option(help="Where to train.")] = "cpu",
    rank: Annotated[int, typer.Option(min=0, help="Largest rank it can train; 0 for any.")] = 0,
    idle: Annotated[
        float, typer.Option(min=1, help="Seconds without work until the model leaves memory.")
    ] = 600.0,
    health: Health = None,
    log_json: LogJson = False,
) -> None:
    """Take part in a consortium until told to stop.

    Example: fedlora client --server fl.example.org:8443 --name site-0 --data rows.jsonl
    --home /var/lib/fedlora --certs certs/site-0
    """
    from fedlora.cli.client import client_tls, run_client, take_seat
    from fedlora.client.supervisor import ClientOptions
    from fedlora.logs import configure, environment

    configure(log_json)
    seat = take_seat(home, name, partition, data)
    tls = client_tls(seat, certs, enrol, insecure=insecure)
    run_client(
        ClientOptions(
            server, seat, data, tls, policy, device, rank, idle, health, environment(log_json)
        )
    )


@app.command(name="run")
def run_job(
    job: Annotated[Path | None, typer.Argument(help="Job file; without it the default.")] = None,
    server: Server = "127.0.0.1:8443",
    out: Annotated[Path | None, typer.Option(help="Run folder; must not exist.")] = None,
    certs: Certs = None,
    insecure: Insecure = False,
    detach: Annotated[bool, typer.Option(help="Print the run's id, and do not follow it.")] = False,
    override: Override = None,
    json: AsJson = False,
) -> None:
    """Start a run on a server, follow it, and fetch what it leaves.

    Example: fedlora run job.toml --server fl.example.org:8443 --certs certs/operator --out first
    """
    from fedlora.cli.run import run_run
    from fedlora.cli.server import tls_files

    tls = tls_files(certs, "operator", insecure=insecure)
    run_run(job, server, certs, tls, out, override or [], detach=detach, as_json=json)


@app.command()
def watch(
    what: Annotated[str, typer.Argument(help="A run's folder, or HOST:PORT of a server.")],
    run: Annotated[str, typer.Option(help="Which run of the server; by default the newest.")] = "",
    certs: Certs = None,
    insecure: Insecure = False,
    json: AsJson = False,
) -> None:
    """Follow a run as it goes.

    Example: fedlora watch runs/first
    """
    from fedlora.cli.watch import watch_folder, watch_server

    if ":" in what and not Path(what).exists():
        from fedlora.cli.server import tls_files

        tls = tls_files(certs, "operator", insecure=insecure)
        watch_server(what, tls, run, as_json=json)
    else:
        watch_folder(Path(what), as_json=json)


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
    path: Annotated[
        Path, typer.Argument(help="Run folder, adapter folder, ledger or .safetensors file.")
    ],
    json: AsJson = False,
) -> None:
    """Say what an adapter, delta, privacy ledger or run folder is.

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
