"""TlsFiles: the certificate files of one process, checked before they are used.

What OpenSSL and gRPC say about a bad file is one word; here each case has its own message.
"""

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature

from fedlora.errors import CertificateError
from fedlora.pki.files import read_file
from fedlora.pki.keys import nist_key, public_bytes, read_certificates, read_key
from fedlora.pki.subject import Role, Subject


@dataclass(frozen=True)
class Credentials:
    """What gRPC and `ssl` take, checked.

    Attributes:
        ca: PEM of the authority's certificates.
        certificate: PEM of the own certificate.
        key: PEM of its private key.
        subject: whom the certificate is for.
        serial: its serial number.
        ends: when it expires.
    """

    ca: bytes
    certificate: bytes
    key: bytes
    subject: Subject
    serial: int
    ends: datetime

    def __repr__(self) -> str:
        # never the key
        return f"Credentials({self.subject}, serial={self.serial:x}, ends={self.ends})"


@dataclass(frozen=True)
class TlsFiles:
    """Three PEM files; `load` reads and checks them.

    Attributes:
        ca: certificate of the consortium's authority.
        certificate: the own certificate.
        key: the own private key.
    """

    ca: Path
    certificate: Path
    key: Path

    def load(self, role: Role | None, *, now: datetime | None = None) -> Credentials:
        """The files' content, after every check that can be made without a peer.

        Args:
            role: what the certificate must be for; None takes any.
            now: the time, with its zone; by default this machine's.

        Raises:
            CertificateError: a file is missing or damaged; key and certificate, or
                certificate and authority, do not belong together; another role; or it is not
                valid at this time.
        """
        now = now or datetime.now(UTC)
        authorities = read_certificates(self.ca, "authority certificate")
        certificate = read_certificates(self.certificate)[0]
        key = read_key(self.key)
        if public_bytes(nist_key(certificate.public_key())) != public_bytes(key.public_key()):
            raise CertificateError(
                f"key {self.key} does not belong to certificate {self.certificate}; give the pair "
                "that was made together"
            )
        subject = Subject.of(certificate)
        authority = _issuer(certificate, authorities)
        if authority is None:
            raise CertificateError(
                f"certificate {self.certificate} was signed by "
                f"{certificate.issuer.rfc4514_string()!r}, not by the authority in {self.ca} "
                f"({authorities[0].subject.rfc4514_string()!r}); give the ca.crt that came with it"
            )
        if role is not None and subject.role != role:
            raise CertificateError(
                f"certificate {self.certificate} is for {subject.name!r} in role "
                f"{subject.role!r}; expected role {role!r}: ask the operator for one with "
                f"--role {role}"
            )
        check_validity(authority, f"authority certificate {self.ca}", now)
        check_validity(certificate, f"certificate {self.certificate}", now)
        return Credentials(
            ca=read_file(self.ca, "authority certificate"),
            certificate=read_file(self.certificate, "certificate"),
            key=read_file(self.key, "key file"),
            subject=subject,
            serial=certificate.serial_number,
            ends=certificate.not_valid_after_utc,
        )


def check_validity(certificate: x509.Certificate, what: str, now: datetime) -> None:
    """Accepts a certificate that is valid at `now`.

    Args:
        what: the certificate, for the message.

    Raises:
        CertificateError: expired or not yet valid; names both times and the clock.
    """
    start, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if start <= now < end:
        return
    found = f"is not valid before {stamp(start)}" if now < start else f"expired at {stamp(end)}"
    cure = "" if now < start else ", or ask for a new certificate"
    raise CertificateError(
        f"{what} {found}, and this machine's clock says {stamp(now)}; set the clock if it is wrong"
        f"{cure}"
    )


def stamp(time: datetime) -> str:
    """A time for a message, in UTC to the second."""
    return f"{time.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC"


def _issuer(
    certificate: x509.Certificate, authorities: list[x509.Certificate]
) -> x509.Certificate | None:
    for authority in authorities:
        try:
            certificate.verify_directly_issued_by(authority)
        except (ValueError, TypeError, InvalidSignature):
            continue
        return authority
    return None
