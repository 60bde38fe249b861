"""`fedlora certs init`, `request`, `issue`, `revoke` and `list`"""

import json as jsonlib
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedlora.errors import CertificateError

if TYPE_CHECKING:
    from fedlora.pki import Authority, Issued, Subject

app = typer.Typer(
    help="Make, sign and revoke the certificates of a federation.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Ca = Annotated[Path, typer.Option("--ca", help="Folder of the authority.")]
Out = Annotated[Path, typer.Option(help="Folder to write into.")]
RoleName = Annotated[str, typer.Option("--role", help="client, operator or server.")]
Hosts = Annotated[
    list[str] | None,
    typer.Option("--host", help="Name or IP address of a server; may be repeated."),
]
Backdate = Annotated[
    float, typer.Option(min=0, max=1440, help="Minutes before now from which it is valid.")
]
HEADINGS = ("name", "role", "state", "from", "until", "serial", "hosts")


@app.command()
def init(
    folder: Annotated[Path, typer.Argument(help="Folder to make.")],
    name: Annotated[str, typer.Option(help="Name of the consortium.")] = "fedlora",
    days: Annotated[int, typer.Option(min=1, max=36500, help="Lifetime.")] = 3650,
    backdate: Backdate = 5,
) -> None:
    """Make an authority. Whoever holds its ca.key can be anybody in the federation.

    Example: fedlora certs init ca --name hospitals
    """
    from fedlora.pki import Authority

    authority = Authority.create(
        folder,
        name,
        now=datetime.now(UTC),
        lifetime=timedelta(days=days),
        backdate=timedelta(minutes=backdate),
    )
    typer.echo(
        f"wrote {folder / 'ca.key'} (keep it here) and {folder / 'ca.crt'} (give it to everybody), "
        f"valid until {authority.certificate.not_valid_after_utc:%Y-%m-%d}"
    )


@app.command()
def request(
    name: Annotated[str, typer.Argument(help="The client's, operator's or server's name.")],
    out: Out,
    role: RoleName = "client",
    host: Hosts = None,
) -> None:
    """Make a key, which stays here, and a signing request for the operator.

    Example: fedlora certs request site-0 --out certs
    """
    from fedlora.pki import write_request

    files = write_request(_subject(name, role, host), out)
    typer.echo(f"wrote {files.key}: keep it here, show it to nobody")
    typer.echo(f"wrote {files.request}: send it to the operator, and ask for certificate and CA")


@app.command()
def issue(
    what: Annotated[str, typer.Argument(metavar="NAME|REQUEST.csr", help="For whom.")],
    ca: Ca,
    out: Out,
    role: RoleName = "client",
    host: Hosts = None,
    days: Annotated[int, typer.Option(min=1, max=36500, help="Lifetime.")] = 365,
    backdate: Backdate = 5,
    renew: Annotated[
        bool, typer.Option("--renew", help="Also if another key holds the name.")
    ] = False,
) -> None:
    """Sign a request, or make key and certificate at once for a machine of your own.

    A request is signed only for the role and hosts that you name here.

    Example: fedlora certs issue site-0.csr --ca ca --out signed
    """
    from fedlora.pki import Authority, answer_request, equip
    from fedlora.pki.keys import read_request

    authority = Authority(ca)
    now, lifetime = datetime.now(UTC), timedelta(days=days)
    before = timedelta(minutes=backdate)
    if what.endswith(".csr"):
        asked = read_request(Path(what))
        subject = asked.subject
        typer.echo(f"{what} asks for: {_shown(subject)}")
        _confirm(subject, role, host or [])
        files, issued = answer_request(
            authority, asked, out, now=now, lifetime=lifetime, backdate=before, renew=renew
        )
    else:
        subject = _subject(what, role, host)
        files, issued = equip(
            authority, subject, out, now=now, lifetime=lifetime, backdate=before, renew=renew
        )
    typer.echo(
        f"wrote {files.certificate}: {_shown(subject)}; serial {issued.serial}, valid until "
        f"{issued.certificate.not_valid_after_utc:%Y-%m-%d}"
    )


@app.command()
def revoke(
    what: Annotated[str, typer.Argument(metavar="NAME|SERIAL", help="Whose, or which one.")],
    ca: Ca,
) -> None:
    """Revoke a certificate, or all of a name. A running server sees it at the next call.

    Example: fedlora certs revoke site-0 --ca ca
    """
    from fedlora.pki import Authority

    fresh = Authority(ca).revoke(what, now=datetime.now(UTC))
    for issued in fresh:
        typer.echo(f"revoked {_shown(issued.subject)}; serial {issued.serial}")
    if not fresh:
        typer.echo(f"{what} was revoked before")


@app.command("list")
def list_all(
    ca: Ca,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show every certificate that was issued, and whether it is good.

    Example: fedlora certs list --ca ca
    """
    from fedlora.pki import Authority

    authority = Authority(ca)
    rows = [_row(issued) for issued in authority.issued(datetime.now(UTC))]
    if json:
        typer.echo(jsonlib.dumps({"authority": _authority_row(authority), "certificates": rows}))
        return
    cells = [HEADINGS, *(tuple(_cell(row[key]) for key in HEADINGS) for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(HEADINGS))]
    for line in cells:
        typer.echo("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip())


def _subject(name: str, role: str, hosts: list[str] | None) -> "Subject":
    from fedlora.pki import Subject

    # a server's own processes reach each other on loopback; without --host it stays an error
    loopback = ["127.0.0.1", "localhost"] if role == "server" and hosts else []
    # Subject refuses a role that is none
    return Subject(name, role, (*(hosts or ()), *loopback))  # type: ignore[arg-type]


def _confirm(asked: "Subject", role: str, hosts: list[str]) -> None:
    """Accepts a request that asks for no more and no less than the operator names."""
    found = _subject(asked.name, role, hosts or None) if role != "server" or hosts else None
    if found == asked:
        return
    flags = "".join(f" --host {host}" for host in asked.hosts)
    raise CertificateError(
        f"the request asks for role {asked.role!r} and hosts: {', '.join(asked.hosts) or 'none'}; "
        f"you named role {role!r} and hosts: {', '.join(hosts) or 'none'}; if {asked.name!r} shall "
        f"have that, add: --role {asked.role}{flags}"
    )


def _shown(subject: "Subject") -> str:
    hosts = f", hosts {', '.join(subject.hosts)}" if subject.hosts else ""
    return f"name {subject.name!r}, role {subject.role}{hosts}"


def _row(issued: "Issued") -> dict[str, Any]:
    certificate, subject = issued.certificate, issued.subject
    return {
        "name": subject.name,
        "role": subject.role,
        "state": issued.state,
        "from": certificate.not_valid_before_utc.isoformat(),
        "until": certificate.not_valid_after_utc.isoformat(),
        "serial": issued.serial,
        "hosts": list(subject.hosts),
    }


def _authority_row(authority: "Authority") -> dict[str, Any]:
    certificate = authority.certificate
    return {
        "name": certificate.subject.rfc4514_string(),
        "from": certificate.not_valid_before_utc.isoformat(),
        "until": certificate.not_valid_after_utc.isoformat(),
    }


def _cell(value: Any) -> str:
    return ", ".join(value) if isinstance(value, list) else str(value)
