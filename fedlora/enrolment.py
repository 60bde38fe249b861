"""Enrolment through a shared folder, for a federation whose machines share a disk.

A client makes its key in a folder of its own, lays a signing request into the shared one
and waits; the server's side signs every request of a client that lies there. Whoever can
write into the shared folder can become a client, and a new client believes the `ca.crt` it
finds there: the folder stands for the operator who would otherwise look at each request.
"""

import hashlib
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

from fedlora.errors import CertificateError
from fedlora.pki.authority import Authority, Issued
from fedlora.pki.files import make_folder, read_file, write_over
from fedlora.pki.keys import (
    KeyFiles,
    new_key,
    public_bytes,
    read_key,
    read_request,
    request_pem,
    write_flower_files,
    write_key_files,
)
from fedlora.pki.subject import Subject
from fedlora.tls import TlsFiles

POLL_S = 0.2


class DropBox:
    """The signing side of the shared folder.

    A request is answered by `<stem>.crt` and `ca.crt` beside it. A name that was revoked, or
    that another key holds, is left to the operator.

    Args:
        authority: signs.
        folder: the shared folder; made if it is missing.
    """

    def __init__(self, authority: Authority, folder: Path) -> None:
        self.authority = authority
        self.folder = folder
        self._named: set[tuple[str, str]] = set()
        make_folder(folder)

    def sign_requests(self, now: datetime) -> list[str]:
        """Signs what can be signed.

        Returns:
            A line for each request that was signed, and one for each that cannot be; the
            latter only once for the same file and reason.

        Raises:
            CertificateError: the disk refused.
        """
        ca = self.folder / "ca.crt"
        if not ca.is_file() or read_file(ca, "authority certificate") != self.authority.ca_pem:
            write_over(ca, self.authority.ca_pem)
        lines = []
        paths = sorted(path for path in self.folder.glob("*.csr") if path.stem != ca.stem)
        issued = self.authority.issued(now) if paths else []
        for path in paths:
            try:
                line = self._sign(path, issued, now)
            except CertificateError as e:
                reason = (path.name, hashlib.sha256(str(e).encode()).hexdigest())
                line = "" if reason in self._named else f"{path.name} is not signed: {e}"
                self._named.add(reason)
            if line:
                lines.append(line)
        return lines

    def _sign(self, path: Path, issued: list[Issued], now: datetime) -> str:
        request = read_request(path)
        subject, key = request.subject, request.key
        if subject.role != "client":
            raise CertificateError(
                f"it asks for role {subject.role!r}, only clients are signed here; sign it with: "
                f"fedlora certs issue {path} --role {subject.role} --ca {self.authority.folder} "
                f"--out {self.folder}"
            )
        mine = [i for i in issued if i.subject.name == subject.name]
        if any(i.state == "revoked" for i in mine):
            raise CertificateError(
                f"name {subject.name!r} was revoked; if it may come back, sign it with: fedlora "
                f"certs issue {path} --ca {self.authority.folder} --out {self.folder}"
            )
        good = [
            i
            for i in mine
            if i.state == "valid"
            and i.subject == subject
            and public_bytes(i.key) == public_bytes(key)
        ]
        answer = path.with_suffix(".crt")
        if good and answer.is_file() and read_file(answer, "certificate") == good[-1].pem:
            return ""
        if not good:
            good = [self.authority.sign(subject, key, now=now)]
            issued += good
        # one that was signed before a crash is handed out again, not signed twice
        write_over(answer, good[-1].pem)
        return f"{path.name} is signed: client {subject.name!r}, serial {good[-1].serial}"


def enrol(
    folder: Path,
    name: str,
    own: Path,
    *,
    patience_s: float,
    wait: Callable[[float], None],
    now: Callable[[], datetime],
) -> TlsFiles:
    """A client's certificate, by way of the shared folder; at once if it has a good one.

    The private key is made in `own` and stays there. An unfinished enrolment is continued
    with the same key.

    Args:
        folder: the shared folder; may appear later.
        name: the client's name.
        own: folder for the client's key and certificate.
        patience_s: seconds to wait for the certificate, counted by what `wait` was asked for.
        wait: sleeps so many seconds.
        now: the time, with its zone.

    Raises:
        CertificateError: no certificate in time, or the shared folder has another authority
            than the one the client knows.
    """
    subject = Subject(name, "client")
    files = KeyFiles.of(name, own)
    tls = TlsFiles(files.ca, files.certificate, files.key)
    if not files.key.is_file():
        write_key_files(new_key(), files)
    elif files.certificate.is_file():
        try:
            tls.load("client", now=now())
        except CertificateError:
            # expired, or of an authority that is gone: ask again, with the same key
            pass
        else:
            return tls
    key = read_key(files.key)
    write_flower_files(key, files)
    shared = KeyFiles.of(name, folder)
    waited, asked = 0.0, False
    while True:
        if not asked and folder.is_dir():
            write_over(shared.request, request_pem(subject, key))
            asked = True
        why = _take(shared, files, subject, now()) if asked else f"folder {folder} is not there"
        if not why:
            return tls
        if waited >= patience_s:
            raise CertificateError(
                f"client {name!r} has no certificate after {patience_s:g} s: {why}; see what "
                f"the server says about {shared.request.name}"
            )
        step = min(POLL_S, patience_s - waited)
        wait(step)
        waited += step


def _take(shared: KeyFiles, files: KeyFiles, subject: Subject, now: datetime) -> str:
    """Copies the answer to the client's own folder; why it cannot be taken yet, or ""."""
    if not shared.ca.is_file() or not shared.certificate.is_file():
        return f"{shared.certificate} is not there"
    ca = read_file(shared.ca, "authority certificate")
    if files.ca.is_file() and read_file(files.ca, "authority certificate") != ca:
        raise CertificateError(
            f"{shared.ca} is not the authority that this client knows ({files.ca}); if it was "
            "replaced on purpose, remove the latter"
        )
    try:
        # checked where it lies, against our own key, before anything of it is kept
        found = TlsFiles(shared.ca, shared.certificate, files.key).load("client", now=now)
    except CertificateError as e:
        return str(e)
    if found.subject != subject:
        return f"{shared.certificate} is for {found.subject}"
    write_over(files.ca, found.ca)
    write_over(files.certificate, found.certificate)
    return ""
