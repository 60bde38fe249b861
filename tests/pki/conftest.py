"""An authority and certificates of every kind, made once; time is injected."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from fedlora.pki import Authority, Subject, equip
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
    files, _ = equip(authority, subject, folder, now=now, lifetime=lifetime, renew=True)
    return TlsFiles(files.ca, files.certificate, files.key)


@pytest.fixture
def authority(tmp_path):
    return Authority.create(tmp_path / "ca", "hospitals", now=NOW)
