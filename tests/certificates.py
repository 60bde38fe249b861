"""Throwaway certificates: a CA and what it issues, as PEM."""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID


@dataclass(frozen=True)
class Issued:
    certificate: bytes
    key: bytes
    serial: int


class Authority:
    def __init__(self) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = _name("throwaway CA", "ca")
        made = _builder(self._name, self._name, self._key, timedelta(0))
        made = made.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        self.pem = _pem(made.sign(self._key, hashes.SHA256()))

    def issue(self, name: str, role: str, *, shift: timedelta = timedelta(0)) -> Issued:
        """A certificate valid for a day, which begins `shift` from now."""
        key = ec.generate_private_key(ec.SECP256R1())
        made = _builder(_name(name, role), self._name, key, shift).add_extension(
            x509.SubjectAlternativeName(
                [x509.DNSName("localhost"), x509.IPAddress(ip_address("127.0.0.1"))]
            ),
            critical=False,
        )
        certificate = made.sign(self._key, hashes.SHA256())
        pem = key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        return Issued(_pem(certificate), pem, certificate.serial_number)

    def server_credentials(self, issued: Issued, *, mutual: bool) -> grpc.ServerCredentials:
        pair = ((issued.key, issued.certificate),)
        return grpc.ssl_server_credentials(pair, self.pem if mutual else None, mutual)

    def channel_credentials(self, issued: Issued | None = None) -> grpc.ChannelCredentials:
        if issued is None:
            return grpc.ssl_channel_credentials(self.pem)
        return grpc.ssl_channel_credentials(self.pem, issued.key, issued.certificate)


def _name(common: str, unit: str) -> x509.Name:
    return x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, unit),
            x509.NameAttribute(NameOID.COMMON_NAME, common),
        ]
    )


def _builder(subject, issuer, key, shift) -> x509.CertificateBuilder:
    begin = datetime.now(UTC) + shift - timedelta(minutes=5)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(begin)
        .not_valid_after(begin + timedelta(days=1))
    )


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)
