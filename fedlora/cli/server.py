"""`fedlora server`."""

import signal
import sys
from pathlib import Path

from fedlora.errors import ConfigError
from fedlora.pki.subject import Role
from fedlora.server.supervisor import ServerOptions, ServerSupervisor
from fedlora.tls import TlsFiles


def tls_files(certs: Path | None, role: Role, *, insecure: bool) -> TlsFiles | None:
    """The certificate in a folder; None only where plain text was asked for.

    Raises:
        ConfigError: neither, or both.
        CertificateError: the certificate cannot be used.
    """
    if insecure and certs is not None:
        raise ConfigError("--insecure and --certs were both given; leave one out")
    if insecure:
        print(
            "warning: --insecure: nothing is encrypted, and anybody can join; for trials on one "
            "machine only",
            file=sys.stderr,
        )
        return None
    if certs is None:
        raise ConfigError(
            "give --certs FOLDER with a certificate (see: fedlora certs issue --help), or "
            "--insecure for a trial on one machine"
        )
    files = find_certificate(certs)
    files.load(role)
    return files


def find_certificate(folder: Path) -> TlsFiles:
    """The one key in a folder, with its certificate and the authority's.

    Raises:
        ConfigError: there is none, or more than one.
    """
    keys = sorted(folder.glob("*.key"))
    if len(keys) != 1:
        found = ", ".join(path.name for path in keys) or "none"
        raise ConfigError(
            f"--certs {folder}: expected one private key (NAME.key) in it, found {found}; give "
            "every party a folder of its own"
        )
    return TlsFiles(folder / "ca.crt", keys[0].with_suffix(".crt"), keys[0])


def run_server(options: ServerOptions) -> None:
    """Runs a server until SIGTERM or Ctrl-C; see `ServerSupervisor`."""
    supervisor = ServerSupervisor(options)
    signal.signal(signal.SIGTERM, lambda *_: supervisor.stop())
    signal.signal(signal.SIGINT, lambda *_: supervisor.stop())
    supervisor.run()
