"""Which data a privacy ledger is about, without telling anybody what is in it."""

import hashlib
import hmac
import os
import secrets
from collections.abc import Iterable
from pathlib import Path

from fedlora.errors import LedgerError
from fedlora.storage import storage_errors, sync_folder

_KEY_BYTES = 32


def site_key(folder: Path) -> bytes:
    """The site's secret, 32 bytes, made on first use and readable by its owner only.

    Raises:
        LedgerError: the file is not one that was written here.
        StorageError: the disk refused.
    """
    path = folder / "site.key"
    with storage_errors(path):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not path.exists():
            _create(path, secrets.token_bytes(_KEY_BYTES))
        key = path.read_bytes()
    if len(key) != _KEY_BYTES:
        raise LedgerError(
            f"{path} has {len(key)} bytes, expected {_KEY_BYTES}; put back the file that was "
            "there: with another key, data that was trained on is not recognised"
        )
    return key


def dataset_id(key: bytes, record_hashes: Iterable[bytes]) -> str:
    """HMAC-SHA256 of a data set in hexadecimal; the order of its records does not matter.

    Another record, one more or one less make another data set.

    Args:
        key: the site's secret, so that nobody else can test a guess.
        record_hashes: digest of each record, all of one length.
    """
    digest = hmac.new(key, digestmod=hashlib.sha256)
    for record in sorted(record_hashes):
        digest.update(len(record).to_bytes(4, "big") + record)
    return digest.hexdigest()


def _create(path: Path, key: bytes) -> None:
    # linked into place: two processes that start together agree on one key
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        os.write(descriptor, key)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    try:
        os.link(draft, path)
    except FileExistsError:
        pass
    finally:
        draft.unlink()
    sync_folder(path.parent)
