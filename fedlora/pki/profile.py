"""What our certificates contain: RFC 5280, https://www.rfc-editor.org/rfc/rfc5280, section 4.2."""

from datetime import datetime

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedlora.pki.keys import PrivateKey, PublicKey
from fedlora.pki.subject import Subject


def authority_certificate(
    consortium: str, key: PrivateKey, start: datetime, end: datetime
) -> x509.Certificate:
    """A self-signed certificate that can sign others, but no further authorities."""
    name = x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, consortium),
            x509.NameAttribute(NameOID.COMMON_NAME, f"{consortium} CA"),
        ]
    )
    return (
        _blank(name, key.public_key(), name, key, start, end)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .sign(key, hashes.SHA384())
    )


def holder_certificate(
    subject: Subject,
    key: PublicKey,
    authority: x509.Certificate,
    authority_key: PrivateKey,
    start: datetime,
    end: datetime,
) -> x509.Certificate:
    """A certificate for one end of a connection: servers answer, all others call."""
    end_of_connection = (
        ExtendedKeyUsageOID.SERVER_AUTH
        if subject.role == "server"
        else ExtendedKeyUsageOID.CLIENT_AUTH
    )
    builder = (
        _blank(subject.distinguished_name, key, authority.subject, authority_key, start, end)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([end_of_connection]), critical=False)
    )
    if (names := subject.alternative_names) is not None:
        builder = builder.add_extension(names, critical=False)
    return builder.sign(authority_key, hashes.SHA384())


def _blank(
    subject: x509.Name,
    key: PublicKey,
    issuer: x509.Name,
    issuer_key: PrivateKey,
    start: datetime,
    end: datetime,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .public_key(key)
        .issuer_name(issuer)
        .serial_number(x509.random_serial_number())
        .not_valid_before(start)
        .not_valid_after(end)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()),
            critical=False,
        )
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )
