"""Small files that others may write beside: read bounded, written whole, keys never replaced."""

import os
import secrets
import stat
from pathlib import Path
from urllib.parse import quote

from fedlora.errors import CertificateError
from fedlora.storage import sync_folder

MAX_FILE_BYTES = 256 * 1024
PRIVATE = 0o600
PUBLIC = 0o644


def file_name(name: str) -> str:
    """`name` as part of a file name; what is odd in it is percent-quoted."""
    return quote(name, safe=" ")


def read_file(path: Path, what: str) -> bytes:
    """The bytes of a regular file of at most 256 KiB.

    Args:
        what: what the file is, for the message.

    Raises:
        CertificateError: missing, not a file, too large, or not readable.
    """
    try:
        # a pipe that somebody laid in a shared folder must not hold us up
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except FileNotFoundError:
        raise CertificateError(f"{what} {path} does not exist; check the path") from None
    except OSError as e:
        raise CertificateError(f"{what} {path} cannot be read: {e.strerror}") from e
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise CertificateError(f"{what} {path} is not a file; expected one in PEM format")
    with os.fdopen(descriptor, "rb") as file:
        data = file.read(MAX_FILE_BYTES + 1)
    if len(data) > MAX_FILE_BYTES:
        raise CertificateError(
            f"{what} {path} has more than {MAX_FILE_BYTES} bytes; expected a small PEM file"
        )
    return data


def write_new(path: Path, data: bytes, mode: int = PUBLIC) -> None:
    """`data` at `path`, whole and synced, unless something is there.

    Raises:
        CertificateError: `path` exists (it is untouched), or the disk refused.
    """
    _write(path, data, mode, replace=False)


def write_over(path: Path, data: bytes, mode: int = PUBLIC) -> None:
    """`data` at `path`, whole and synced; what was there is replaced.

    Raises:
        CertificateError: the disk refused; what was there is untouched.
    """
    _write(path, data, mode, replace=True)


def make_folder(folder: Path) -> None:
    """Makes `folder` and what is above it.

    Raises:
        CertificateError: it cannot be made, or is a file.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise CertificateError(
            f"folder {folder} cannot be made: {e.strerror}; give another folder"
        ) from e


def _write(path: Path, data: bytes, mode: int, *, replace: bool) -> None:
    # a name that nobody can guess, so that no link can wait for us there
    temporary = path.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(descriptor)
            if replace:
                os.rename(temporary, path)
            else:
                os.link(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        sync_folder(path.parent)
    except FileExistsError:
        raise CertificateError(
            f"{path} exists and is not overwritten; give another folder, or move it away"
        ) from None
    except OSError as e:
        raise CertificateError(f"{path} cannot be written: {e.strerror}") from e
