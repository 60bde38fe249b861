"""An authority and certificates of every kind, made once; time is injected."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from fedlora.pki import Authority, KeyFiles, Subject
from fedlora.pki.keys import new_key, write_key_files
from fedlora.tls import TlsFiles

NOW = datetime(2030, 6, 1, 12, 0, tzinfo=UTC)
HOSTS = ("localhost", "127.0.0.1")


def hand_out(
    authority: Authority,
    folder: Path,
    subject: Subject,
    *,
    now: datetime = NOW,
    lifetime: timedelta = timedelta(days=365),
) -> TlsFiles:
    """A new key and its certificate in `folder`."""
    key, files = new_key(), KeyFiles.of(subject.name, folder)
    write_key_files(key, files)
    issued = authority.sign(subject, key.public_key(), now=now, lifetime=lifetime, renew=True)
    files.certificate.write_bytes(issued.pem)
    files.ca.write_bytes(authority.ca_pem)
    return TlsFiles(files.ca, files.certificate, files.key)


@pytest.fixture
def authority(tmp_path):
    return Authority.create(tmp_path / "ca", "hospitals", now=NOW)
