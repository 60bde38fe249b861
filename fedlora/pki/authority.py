"""Authority: a folder that signs certificates, records them, and revokes them.

ca.key                          the authority's key; whoever has it can be anybody
ca.crt                          its certificate; everybody has it
issued/<name>-<serial>.crt      every certificate it ever signed
revoked.json                    those that are no longer good
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal, Self

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from fedlora.errors import CertificateError, near_miss
from fedlora.pki.files import PRIVATE, file_name, make_folder, write_new
from fedlora.pki.keys import (
    PublicKey,
    new_key,
    nist_key,
    private_pem,
    public_bytes,
    read_certificates,
    read_key,
)
from fedlora.pki.profile import authority_certificate, holder_certificate
from fedlora.pki.revoked import Entry, read_revoked, write_revoked
from fedlora.pki.subject import Subject

LIFETIME = timedelta(days=365)
CA_LIFETIME = timedelta(days=3650)
# a machine whose clock is a little behind must not find a new certificate "not yet valid"
BACKDATE = timedelta(minutes=5)

State = Literal["valid", "not yet valid", "expired", "revoked"]


@dataclass(frozen=True)
class Issued:
    """A certificate that the authority signed.

    Attributes:
        subject: whom it is for.
        certificate: the certificate.
        state: whether it is good at the time of asking.
    """

    subject: Subject
    certificate: x509.Certificate
    state: State

    @property
    def key(self) -> PublicKey:
        """The holder's public key."""
        return nist_key(self.certificate.public_key())

    @property
    def serial(self) -> str:
        """Serial number in lower-case hexadecimal."""
        return f"{self.certificate.serial_number:x}"

    @property
    def pem(self) -> bytes:
        """The certificate as a file."""
        return self.certificate.public_bytes(Encoding.PEM)


class Authority:
    """The authority in a folder; `create` makes one.

    Raises:
        CertificateError: not an authority's folder, a key that others can read, or a key and
            a certificate that do not belong together.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        key_path = folder / "ca.key"
        if not key_path.is_file():
            raise CertificateError(
                f"{folder} has no ca.key, so it is no authority's folder; make one with: "
                f"fedlora certs init {folder}"
            )
        if key_path.stat().st_mode & 0o077:
            raise CertificateError(
                f"{key_path} can be read by others, who could then be anybody in the "
                f"federation; close it with: chmod 600 {key_path}"
            )
        self._key = read_key(key_path)
        self.certificate = read_certificates(folder / "ca.crt", "authority certificate")[0]
        if public_bytes(self._key.public_key()) != public_bytes(
            nist_key(self.certificate.public_key())
        ):
            raise CertificateError(
                f"ca.key and ca.crt in {folder} do not belong together; restore both from one copy"
            )

    @classmethod
    def create(
        cls,
        folder: Path,
        consortium: str,
        *,
        now: datetime,
        lifetime: timedelta = CA_LIFETIME,
        backdate: timedelta = BACKDATE,
    ) -> Self:
        """Makes an authority.

        Args:
            folder: must not hold one.
            consortium: name of the federation, 1 to 60 printable characters.
            now: the time, with its zone.

        Raises:
            CertificateError: the folder holds an authority, or the disk refused.
        """
        if not consortium.isprintable() or not 0 < len(consortium) <= 60:
            raise CertificateError(
                f"consortium name {consortium[:80]!r} has {len(consortium)} characters; expected "
                "1 to 60, all printable"
            )
        make_folder(folder / "issued")
        key = new_key()
        # the key comes first: of two that begin at the same time, one fails here
        write_new(folder / "ca.key", private_pem(key), PRIVATE)
        certificate = authority_certificate(consortium, key, now - backdate, _end(now, lifetime))
        write_revoked(folder / "revoked.json", [])
        write_new(folder / "ca.crt", certificate.public_bytes(Encoding.PEM))
        return cls(folder)

    @property
    def ca_pem(self) -> bytes:
        """The authority's certificate as a file."""
        return self.certificate.public_bytes(Encoding.PEM)

    def sign(
        self,
        subject: Subject,
        key: PublicKey,
        *,
        now: datetime,
        lifetime: timedelta = LIFETIME,
        backdate: timedelta = BACKDATE,
        renew: bool = False,
    ) -> Issued:
        """A certificate that `key` belongs to `subject`, recorded before it is returned.

        It never outlives the authority.

        Args:
            now: the time, with its zone.
            renew: sign also when another key holds the name.

        Raises:
            CertificateError: the key was revoked, another key holds the name, or the
                authority has expired.
        """
        own = self.certificate
        end = min(_end(now, lifetime), own.not_valid_after_utc)
        if end <= now:
            raise CertificateError(
                f"the certificate would have ended at {end:%Y-%m-%d %H:%M} UTC, before now "
                f"({now:%Y-%m-%d %H:%M} UTC); the authority's own ends at "
                f"{own.not_valid_after_utc:%Y-%m-%d %H:%M} UTC"
            )
        with self._locked():
            self._check_free(subject, key, now, renew)
            certificate = holder_certificate(subject, key, own, self._key, now - backdate, end)
            issued = Issued(subject, certificate, "valid")
            write_new(self._path(subject.name, issued.serial), issued.pem)
        return issued

    def issued(self, now: datetime) -> list[Issued]:
        """Every certificate that was ever signed, by name and then by age.

        Raises:
            CertificateError: a file of the folder is damaged.
        """
        revoked = {entry.serial for entry in self.revoked()}
        found = []
        for path in (self.folder / "issued").glob("*.crt"):
            certificate = read_certificates(path)[0]
            state: State = "valid"
            if f"{certificate.serial_number:x}" in revoked:
                state = "revoked"
            elif now < certificate.not_valid_before_utc:
                state = "not yet valid"
            elif now >= certificate.not_valid_after_utc:
                state = "expired"
            found.append(Issued(Subject.of(certificate), certificate, state))
        return sorted(
            found, key=lambda i: (i.subject.name, i.certificate.not_valid_before_utc, i.serial)
        )

    def revoked(self) -> list[Entry]:
        """The list of revoked certificates; see `fedlora.pki.revoked`."""
        return read_revoked(self.folder / "revoked.json")

    def revoke(self, name_or_serial: str, *, now: datetime) -> list[Issued]:
        """Revokes one certificate by its serial number, or all of a name.

        Returns:
            Those that were not revoked before.

        Raises:
            CertificateError: nothing of that name or serial was issued.
        """
        with self._locked():
            every = self.issued(now)
            serial = name_or_serial.lower().removeprefix("0x")
            # a name that looks like a serial number is still a name
            chosen = [i for i in every if i.subject.name == name_or_serial] or [
                i for i in every if i.serial == serial
            ]
            if not chosen:
                names = sorted({i.subject.name for i in every})
                raise CertificateError(
                    f"{name_or_serial[:80]!r} is neither a name nor a serial number that was "
                    f"issued here{near_miss(name_or_serial, names)}; see: fedlora certs list --ca "
                    f"{self.folder}"
                )
            fresh = [i for i in chosen if i.state != "revoked"]
            when = now.astimezone(UTC).isoformat(timespec="seconds")
            entries = [Entry(i.serial, i.subject.name, when) for i in fresh]
            if entries:
                write_revoked(self.folder / "revoked.json", [*self.revoked(), *entries])
        return fresh

    def _check_free(self, subject: Subject, key: PublicKey, now: datetime, renew: bool) -> None:
        asked = public_bytes(key)
        for other in self.issued(now):
            same = public_bytes(other.key) == asked
            if same and other.state == "revoked":
                raise CertificateError(
                    f"the key of {subject.name!r} was revoked (serial {other.serial}, name "
                    f"{other.subject.name!r}); make a new one with: fedlora certs request"
                )
            held = other.subject.name == subject.name and other.state == "valid"
            if held and not same and not renew:
                raise CertificateError(
                    f"name {subject.name!r} has a valid certificate of another key (serial "
                    f"{other.serial}, role {other.subject.role}); if that key is lost, revoke it "
                    "first; if both shall hold, sign again with --renew"
                )

    def _path(self, name: str, serial: str) -> Path:
        return self.folder / "issued" / f"{file_name(name)}-{serial}.crt"

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """One writer at a time, also from other processes."""
        descriptor = os.open(self.folder / ".lock", os.O_RDWR | os.O_CREAT, PRIVATE)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


def _end(now: datetime, lifetime: timedelta) -> datetime:
    try:
        return now + lifetime
    except OverflowError:
        raise CertificateError(
            f"a lifetime of {lifetime.days} days ends after the year 9999; give fewer days"
        ) from None
