"""`fedlora server`."""

import signal
import sys
from pathlib import Path

from fedlora.errors import ConfigError
from fedlora.server.supervisor import ServerOptions, ServerSupervisor
from fedlora.tls import TlsFiles


def tls_files(certs: Path | None, role: str, *, insecure: bool) -> TlsFiles | None:
    """The certificate in a folder; None only where plain text was asked for.

    Raises:
        ConfigError: neither, both, or an unusable certificate.
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
    return TlsFiles.load(certs, role)


def run_server(options: ServerOptions) -> None:
    """Runs a server until SIGTERM or Ctrl-C; see `ServerSupervisor`."""
    supervisor = ServerSupervisor(options)
    signal.signal(signal.SIGTERM, lambda *_: supervisor.stop())
    signal.signal(signal.SIGINT, lambda *_: supervisor.stop())
    supervisor.run()
