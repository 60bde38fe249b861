"""Who is calling: the certificate that mutual TLS has verified."""

from dataclasses import dataclass

import grpc
from cryptography import x509
from cryptography.x509.oid import NameOID


@dataclass(frozen=True)
class Identity:
    """A peer's certificate.

    Attributes:
        name: its common name; the client's name if the role is "client".
        role: its organizational unit: "client", "operator" or "server".
        serial: its serial number.
    """

    name: str
    role: str
    serial: int


def peer_identity(context: grpc.ServicerContext) -> Identity | None:
    """The caller's identity, None without mutual TLS.

    gRPC has verified the certificate against the server's CA before any call arrives. One
    without exactly one common name and one organizational unit identifies nobody.
    """
    pem = context.auth_context().get("x509_pem_cert")
    if not pem:
        return None
    try:
        certificate = x509.load_pem_x509_certificate(pem[0])
        [name] = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
        [role] = certificate.subject.get_attributes_for_oid(NameOID.ORGANIZATIONAL_UNIT_NAME)
    except ValueError:
        return None
    return Identity(str(name.value), str(role.value), certificate.serial_number)
