"""Keys and signing requests (PKCS #10, https://www.rfc-editor.org/rfc/rfc2986).

A key is written in two encodings: PKCS #8 for TLS, and OpenSSH for Flower's SuperNode
(`--auth-supernode-private-key`) and `flwr supernode register`. It is the same key.
"""

from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)

from fedlora.errors import CertificateError
from fedlora.pki.files import PRIVATE, file_name, make_folder, read_file, write_new, write_over
from fedlora.pki.subject import Subject

# those that TLS 1.3 and Flower's SuperNode authentication both take
CURVES = (ec.SECP256R1, ec.SECP384R1, ec.SECP521R1)

PublicKey = ec.EllipticCurvePublicKey
PrivateKey = ec.EllipticCurvePrivateKey


@dataclass(frozen=True)
class KeyFiles:
    """The files of one holder's key and certificate in a folder.

    Attributes:
        key: private key for TLS (PEM, PKCS #8); never leaves the machine.
        flower_key: the same key for `flower-supernode --auth-supernode-private-key` (OpenSSH).
        flower_public_key: its public half (OpenSSH), for `flwr supernode register`.
        request: signing request for the operator of the authority.
        certificate: what the operator sends back.
        ca: the authority's certificate.
    """

    key: Path
    flower_key: Path
    flower_public_key: Path
    request: Path
    certificate: Path
    ca: Path

    @classmethod
    def of(cls, name: str, folder: Path) -> "KeyFiles":
        """The files for `name` in `folder`, whether they exist or not."""
        stem = file_name(name)
        # without a dot in them, no two names can share a file
        ends = ("key", "ssh", "pub", "csr", "crt")
        key, ssh, pub, csr, crt = (folder / f"{stem}.{end}" for end in ends)
        return cls(key, ssh, pub, csr, crt, folder / "ca.crt")


def new_key() -> PrivateKey:
    """A fresh EC P-384 key."""
    return ec.generate_private_key(ec.SECP384R1())


def write_key_files(key: PrivateKey, files: KeyFiles) -> None:
    """Writes a key, for TLS and for Flower; private files can be read by their owner only.

    Raises:
        CertificateError: there is a key already, or the disk refused.
    """
    make_folder(files.key.parent)
    write_new(files.key, private_pem(key), PRIVATE)
    write_flower_files(key, files)


def write_flower_files(key: PrivateKey, files: KeyFiles) -> None:
    """The key once more, as Flower reads it; what is there is replaced."""
    private = key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
    public = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    write_over(files.flower_key, private, PRIVATE)
    write_over(files.flower_public_key, public + b"\n")


def write_request(subject: Subject, folder: Path) -> KeyFiles:
    """Makes a key and a signing request for it in `folder`.

    Raises:
        CertificateError: there is a key already, or the disk refused.
    """
    files, key = KeyFiles.of(subject.name, folder), new_key()
    write_key_files(key, files)
    write_over(files.request, request_pem(subject, key))
    return files


def request_pem(subject: Subject, key: PrivateKey) -> bytes:
    """A signing request for `subject`, signed with its key."""
    builder = x509.CertificateSigningRequestBuilder().subject_name(subject.distinguished_name)
    if (names := subject.alternative_names) is not None:
        builder = builder.add_extension(names, critical=False)
    return builder.sign(key, hashes.SHA384()).public_bytes(Encoding.PEM)


def private_pem(key: PrivateKey) -> bytes:
    """PKCS #8, not encrypted."""
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def public_bytes(key: PublicKey) -> bytes:
    """SubjectPublicKeyInfo (DER); equal for equal keys."""
    return key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def nist_key(key: object) -> PublicKey:
    """`key`, if TLS and Flower both take its kind.

    Raises:
        CertificateError: not an EC key of a NIST curve from P-256 up.
    """
    if not isinstance(key, PublicKey) or not isinstance(key.curve, CURVES):
        raise CertificateError(
            "the key is not an EC key on P-256, P-384 or P-521, which TLS and Flower both take; "
            "make one with: fedlora certs request"
        )
    return key


def read_key(path: Path) -> PrivateKey:
    """The private key in a PEM file.

    Raises:
        CertificateError: missing, encrypted, not a key, or not of a curve that we take.
    """
    data = read_file(path, "key file")
    try:
        key = load_pem_private_key(data, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as e:
        raise CertificateError(
            f"key file {path} is not a private key in PEM format without a password ({e}); "
            "expected what fedlora certs request or issue wrote"
        ) from e
    nist_key(key.public_key())
    assert isinstance(key, PrivateKey)
    return key


@dataclass(frozen=True)
class Request:
    """A signing request: who asks, and the key that the certificate shall be for."""

    subject: Subject
    key: PublicKey


def read_request(path: Path) -> Request:
    """The signing request in a PEM file; its signature proves that the sender has the key.

    Raises:
        CertificateError: missing, damaged, or of a subject or key that we do not take.
    """
    data = read_file(path, "request")
    try:
        request = x509.load_pem_x509_csr(data)
        key = request.public_key()
        signed = request.is_signature_valid
    except (ValueError, TypeError, UnsupportedAlgorithm) as e:
        raise CertificateError(
            f"request {path} is not a signing request in PEM format ({e}); expected what "
            "fedlora certs request wrote"
        ) from e
    if not signed:
        raise CertificateError(
            f"request {path} is not signed with its own key: it was changed on the way; ask for "
            "it again"
        )
    return Request(Subject.of(request), nist_key(key))


def read_certificates(path: Path, what: str = "certificate") -> list[x509.Certificate]:
    """The certificates in a PEM file, at least one.

    Raises:
        CertificateError: missing, or none in it.
    """
    data = read_file(path, what)
    try:
        return x509.load_pem_x509_certificates(data)
    except ValueError as e:
        raise CertificateError(
            f"{what} {path} is not a certificate in PEM format ({e}); expected what fedlora certs "
            "wrote"
        ) from e
