"""The exchange's process: `python -m fedlora.server.exchange_process`, started by the server."""

import argparse
import logging
import signal
import sys
import threading
from datetime import UTC, datetime
from pathlib import Path

import grpc

from fedlora.enrolment import DropBox
from fedlora.errors import CertificateError, FedloraError
from fedlora.pki.authority import Authority
from fedlora.pki.revoked import Revoked
from fedlora.protos.consortium_pb2_grpc import add_ConsortiumServicer_to_server
from fedlora.server.blob_store import BlobStore
from fedlora.server.consortium import Consortium
from fedlora.server.control import FlowerControl
from fedlora.server.exchange import ExchangeServer
from fedlora.server.home import Home
from fedlora.server.run_events import FollowedFolders
from fedlora.tickets import ticket_key
from fedlora.tls import TlsFiles

log = logging.getLogger(__name__)

# seconds between two looks at the drop-box of requests
ENROL_S = 0.5
# seconds that transfers have to end when the server stops
DRAIN_S = 3.0


def main(arguments: list[str] | None = None) -> int:
    """Serves until SIGTERM; gives the exit code."""
    options = _parser().parse_args(arguments)
    try:
        serve(options)
    except FedloraError as e:
        print(f"error: {e}", file=sys.stderr)
        return e.exit_code
    return 0


def serve(options: argparse.Namespace) -> None:
    """Serves a server's folder until SIGTERM.

    Raises:
        FedloraError: a certificate, port or folder that cannot be used.
    """
    home = Home(options.home)
    home.prepare()
    stopped = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stopped.set())
    signal.signal(signal.SIGINT, lambda *_: stopped.set())
    tls = None if options.insecure else TlsFiles(options.ca, options.cert, options.key)
    control = FlowerControl(options.flower_port, tls.ca if tls else None)
    revoked = Revoked(options.ca_folder / "revoked.json") if options.ca_folder else None
    is_revoked = revoked.is_revoked if revoked else _nobody
    consortium = Consortium(
        home,
        flower_port=options.flower_port,
        register=control.register if tls else None,
        is_known=tls is not None,
        is_revoked=is_revoked,
        allow_plugins=options.allow_plugins,
    )
    store = BlobStore(home.exchange)
    store.collect([place.run for place in home.places() if place.outcome() is None])
    enrolment = (
        DropBox(Authority(options.ca_folder), options.enrol)
        if options.enrol and options.ca_folder
        else None
    )
    server = ExchangeServer(
        store,
        ticket_key(home.ticket_key),
        address=f"{options.host}:{options.port}",
        credentials=_credentials(tls),
        require_identity=tls is not None,
        is_revoked=is_revoked,
        events=FollowedFolders(home.runs),
        services={
            "fedlora.v1.Consortium": lambda grpc_server: add_ConsortiumServicer_to_server(
                consortium, grpc_server
            )
        },
    )
    server.start()
    try:
        while not stopped.wait(ENROL_S):
            if enrolment is not None:
                try:
                    for line in enrolment.sign_requests(datetime.now(UTC)):
                        log.info("%s", line)
                except CertificateError as e:
                    # clients write into that folder: what they do there must stop nobody else
                    log.error("enrolment: %s", e)
    finally:
        server.drain(DRAIN_S)
        control.close()


def _nobody(serial: int) -> bool:
    return False


def _credentials(tls: TlsFiles | None) -> grpc.ServerCredentials | None:
    if tls is None:
        return None
    found = tls.load("server")
    pairs = [(found.key, found.certificate)]
    return grpc.ssl_server_credentials(pairs, found.ca, require_client_auth=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="exchange")
    parser.add_argument("--home", type=Path, required=True)
    parser.add_argument("--host", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--flower-port", type=int, required=True)
    parser.add_argument("--insecure", action="store_true")
    parser.add_argument("--ca", type=Path)
    parser.add_argument("--cert", type=Path)
    parser.add_argument("--key", type=Path)
    parser.add_argument("--ca-folder", type=Path)
    parser.add_argument("--enrol", type=Path)
    parser.add_argument("--allow-plugins", action="store_true")
    return parser


if __name__ == "__main__":
    sys.exit(main())
