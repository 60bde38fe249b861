"""Joining: a client presents itself to the server, and learns where Flower listens."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import grpc
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fedlora import __version__
from fedlora.clock import check_clock
from fedlora.diagnosis import diagnose
from fedlora.errors import ClockError, ConfigError, JoinDelayed, JoinRefused
from fedlora.protos import consortium_pb2 as pb
from fedlora.protos.consortium_pb2_grpc import ConsortiumStub
from fedlora.storage import storage_errors
from fedlora.tls import Credentials, TlsFiles

CALL_S = 20.0

# the server has looked at this client and will not have it; anything else may pass
REFUSALS = (
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.ALREADY_EXISTS,
    grpc.StatusCode.UNIMPLEMENTED,
)


@dataclass(frozen=True)
class Joined:
    """Where the server's SuperLink listens, on the host that was called."""

    flower_port: int


def join(
    server: str,
    name: str,
    tls: TlsFiles | None,
    public_key: bytes,
    clock: Callable[[], float] = time.time,
) -> Joined:
    """Calls the server once.

    Args:
        server: HOST:PORT of its exchange.
        name: of this client.
        tls: this client's certificate; None for plain text.
        public_key: of this client's SuperNode (PEM).
        clock: seconds since 1970-01-01 UTC.

    Raises:
        ConfigError: not of the form HOST:PORT.
        CertificateError: this client's certificate cannot be used.
        ClockError: the clocks are too far apart.
        JoinDelayed: the server is not there, or not ready.
        JoinRefused: it will not have this client as it is; says why and what to do.
    """
    host, port = split_address(server)
    credentials = tls.load("client") if tls else None
    with channel(server, credentials) as opened:
        request = pb.JoinRequest(
            version=__version__, name=name, public_key=public_key, clock_s=clock()
        )
        try:
            reply = ConsortiumStub(opened).Join(request, timeout=CALL_S)
        except grpc.RpcError as e:
            if e.code() is grpc.StatusCode.OUT_OF_RANGE:
                raise ClockError(e.details()) from e
            if e.code() in REFUSALS:
                raise JoinRefused(f"server {server} refuses this client: {e.details()}") from e
            found = diagnose(host, port, tls)
            if found.lasting:
                raise JoinRefused(found.text) from e
            raise JoinDelayed(f"{found.text}; the server says: {e.details()}") from e
    if reply.version != __version__:
        raise JoinRefused(
            f"server {server} runs fedlora {reply.version!r}, this client {__version__!r}; "
            "install the same version on both"
        )
    check_clock(clock(), reply.clock_s)
    return Joined(reply.flower_port)


def channel(server: str, credentials: Credentials | None) -> grpc.Channel:
    """A channel to HOST:PORT; plain text only where no certificate is given."""
    if credentials is None:
        return grpc.insecure_channel(server)
    return grpc.secure_channel(
        server,
        grpc.ssl_channel_credentials(credentials.ca, credentials.key, credentials.certificate),
    )


def split_address(server: str) -> tuple[str, int]:
    """Host and port of HOST:PORT.

    Raises:
        ConfigError: it has another form.
    """
    host, colon, port = server.rpartition(":")
    if not colon or not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ConfigError(f"--server {server!r}: expected HOST:PORT, e.g. fl.example.org:8443")
    return host.strip("[]"), int(port)


def new_node_key(path: Path) -> bytes:
    """A fresh key for this client's SuperNode, in the OpenSSH format that Flower reads.

    Flower registers a key once and for all, and a node that was killed cannot come back under
    its registration for a minute; so every start of a SuperNode joins with a key of its own.

    Args:
        path: of the private key, which never leaves the site.

    Returns:
        the public key (PEM).

    Raises:
        StorageError: the disk refused.
    """
    key = ec.generate_private_key(ec.SECP384R1())
    private = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.OpenSSH,
        serialization.NoEncryption(),
    )
    path.unlink(missing_ok=True)
    with storage_errors(path):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(private)
    return key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
