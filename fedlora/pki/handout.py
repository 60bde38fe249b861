"""Certificates into folders: the answer to a request, or all files of a machine of one's own."""

from datetime import datetime, timedelta
from pathlib import Path

from fedlora.errors import CertificateError
from fedlora.pki.authority import BACKDATE, LIFETIME, Authority, Issued
from fedlora.pki.files import make_folder, read_file, write_over
from fedlora.pki.keys import KeyFiles, Request, new_key, write_key_files
from fedlora.pki.subject import Subject


def answer_request(
    authority: Authority,
    request: Request,
    folder: Path,
    *,
    now: datetime,
    lifetime: timedelta = LIFETIME,
    backdate: timedelta = BACKDATE,
    renew: bool = False,
) -> tuple[KeyFiles, Issued]:
    """Signs a request as it is; certificate and authority's certificate go into `folder`.

    Raises:
        CertificateError: see `Authority.sign`; or the folder belongs to another authority.
    """
    files = _prepared(authority, request.subject, folder)
    issued = authority.sign(
        request.subject, request.key, now=now, lifetime=lifetime, backdate=backdate, renew=renew
    )
    _finish(authority, issued, files)
    return files, issued


def equip(
    authority: Authority,
    subject: Subject,
    folder: Path,
    *,
    now: datetime,
    lifetime: timedelta = LIFETIME,
    backdate: timedelta = BACKDATE,
    renew: bool = False,
) -> tuple[KeyFiles, Issued]:
    """A new key for `subject`, its certificate and the authority's, in `folder`.

    Raises:
        CertificateError: see `Authority.sign`; the folder belongs to another authority or
            holds a key of that name.
    """
    files, key = _prepared(authority, subject, folder), new_key()
    if files.key.exists():
        raise CertificateError(
            f"{files.key} exists and is not overwritten; give another folder, or for a new "
            f"certificate of that key: fedlora certs issue {files.request}"
        )
    issued = authority.sign(
        subject, key.public_key(), now=now, lifetime=lifetime, backdate=backdate, renew=renew
    )
    write_key_files(key, files)
    _finish(authority, issued, files)
    return files, issued


def _prepared(authority: Authority, subject: Subject, folder: Path) -> KeyFiles:
    make_folder(folder)
    files = KeyFiles.of(subject.name, folder)
    if files.ca.exists() and read_file(files.ca, "certificate") != authority.ca_pem:
        raise CertificateError(
            f"{files.ca} is of another authority than {authority.folder}; give another folder"
        )
    return files


def _finish(authority: Authority, issued: Issued, files: KeyFiles) -> None:
    write_over(files.ca, authority.ca_pem)
    write_over(files.certificate, issued.pem)
